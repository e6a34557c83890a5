"""Whether anything has become slower than in the run that is kept."""

from pathlib import Path

from .report import LIBRARIES, ratio, Results


# What two runs on a shared machine differ by, and more.
_SLACK = 1.3


def regressions(new: Results, old: Results) -> list[str]:
    """What has become slower than it was, by others in the same run as a clock."""
    found = []
    for group in ("workloads", "training"):
        was = old.get(group, {})
        for name, workload in new.get(group, {}).items():
            if name in was:
                found += _of_workload(name, workload, was[name])
    return found


def _of_workload(name: str, new: Results, old: Results) -> list[str]:
    if new["what"] != old["what"]:  # Another size.
        return []
    found = []
    for kind in ("forward", "both", "step"):
        for library in LIBRARIES:
            now, then = (ratio(w, library, kind) for w in (new, old))
            if now and then and now * _SLACK < then:
                found.append(
                    f"{name}, {kind}: {library} took {then:.2f} times as long as "
                    f"equilax, and now {now:.2f} times"
                )
    return found


def differences(new: Results, old: Results) -> list[str]:
    """What of the machine and of the versions is another one."""
    found = []
    for group in ("machine", "versions"):
        now, then = (run.get(group, {}) for run in (new, old))
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                found.append(
                    f"{key}: {then.get(key) or 'none'}, now {now.get(key) or 'none'}"
                )
    return found


def judge(new: Results, old: Results | None, kept: Path) -> tuple[str, bool]:
    """What to print, and whether that is a failure."""
    if old is None:
        return f"There is no {kept.name} to compare with.", False
    slower, others = regressions(new, old), differences(new, old)
    text = "\n".join(slower) or "Nothing has become slower."
    if others:
        text += "\nNo failure, whatever it says: the run that is kept had other"
        text += " conditions.\n" + "\n".join(others)
    return text, bool(slower) and not others
