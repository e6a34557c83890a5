from .base import AbstractBatching as AbstractBatching
from .if_wanted import if_wanted as if_wanted
from .lockstep import Lockstep as Lockstep
from .loop import (
    aligned as aligned,
    Carry as Carry,
    Loop as Loop,
    while_loop as while_loop,
)
from .staged import Staged as Staged
from .vmapped import Vmapped as Vmapped
