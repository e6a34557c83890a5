"""The cells in PyTorch, each `(zs, params, xs)` for a batch of states.

The parameters are those of the workload, leaf by leaf in the order of JAX. A problem of
one sample is a batch of one.
"""

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]


def tanh_cell(z, params, x):
    return torch.tanh(z @ params[0].T + x)


def scaled_cell(z, params, x):
    return torch.tanh(x[:, :1] * (z @ params[0].T) + x[:, 1:])


def affine(z, params, x):
    weight, injection, bias = params[:3]
    return torch.tanh(z @ weight.T + x @ injection.T + bias)


def convolution(z, params, x):
    kernel, mixing = params
    image = F.conv2d(z.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), padding=1)
    return torch.tanh(image.permute(0, 2, 3, 1) + x @ mixing)


def _normalise(z):
    return F.layer_norm(z, z.shape[-1:], eps=1e-5)


def transformer(z, params, x):
    down, key, output, query, up, value = params  # By name, as JAX flattens them.
    batch, length, width = z.shape
    split = lambda w: (z @ w).view(batch, length, 4, -1).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(
        split(query), split(key), split(value), is_causal=True
    )
    h = _normalise(x + mixed.transpose(1, 2).reshape(z.shape) @ output)
    return _normalise(h + torch.tanh(h @ up) @ down)


def linear(z, params, _):
    a, b = params
    return z @ a.T + b


def cosine(z, _, __):
    return torch.cos(z)


def kepler(z, params, _):
    anomaly, eccentricity = params
    return anomaly + eccentricity * torch.sin(z)


def tanh(z, params, _):
    w, x = params
    return torch.tanh(z @ w.T + x)


def self_consistent_field(z, params, _):
    potential, kernel = params
    return torch.softmax(-(potential + z @ kernel.T), -1)


def sinkhorn(z, params, _):
    log_a, log_b, log_k = params
    other = log_b - torch.logsumexp(log_k + z[:, :, None], 1)
    new = log_a - torch.logsumexp(log_k + other[:, None, :], 2)
    return new - new.mean(1, keepdim=True)


def value_iteration(z, params, _):
    rewards, moves = params
    return torch.amax(rewards + 0.9 * torch.einsum("aij,bj->bai", moves, z), 1)


def discrete_choice(z, params, _):
    log_shares, tastes = params
    weights = torch.exp(z[:, None, :] + tastes)
    shares = (weights / (1 + weights.sum(2, keepdim=True))).mean(1)
    return z + log_shares - torch.log(shares)


def chandrasekhar(z, params, _):
    return 1 / (1 - z @ params[0].T)


def complex_exponential(z, params, _):
    return 0.5 * torch.exp(1j * z) + params[0]
