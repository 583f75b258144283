"""Every way to differentiate or map a function of one vector, as PyTorch offers them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

Function = Callable[[Tensor], Tensor]
# (function, point, direction); the direction has the point's shape.
Transform = Callable[[Function, Tensor, Tensor], object]


def _reverse(f: Function, x: Tensor, t: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(_loss(f)(x), x)[0]


def _double_backward(f: Function, x: Tensor, t: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(_loss(f)(x), x, create_graph=True)
    return torch.autograd.grad(first, x, t)[0]


def _dual_numbers(f: Function, x: Tensor, t: Tensor) -> object:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))))


def _forward_over_reverse(f: Function, x: Tensor, t: Tensor) -> object:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x.detach().requires_grad_(), t)
        (first,) = torch.autograd.grad(_loss(f)(x), x, create_graph=True)
        return forward_ad.unpack_dual(first).tangent


def _linearize(f: Function, x: Tensor, t: Tensor) -> object:
    output, tangent = linearize(f, x)
    return output, tangent(t)


def _loss(f: Function) -> Function:
    return lambda x: f(x).sin().sum()


def _directions(x: Tensor) -> Tensor:
    return torch.stack((x.cos(), x.sin(), x.neg()))


def _vmap(f: Function, x: Tensor, t: Tensor) -> Tensor:
    return vmap(f)(torch.stack((x, t)))


# Those of autograd, which surround a function.
AUTOGRAD: dict[str, Transform] = {
    "backward": _reverse,
    "double backward": _double_backward,
    "dual numbers": _dual_numbers,
}
# Those that the compiler sees as a whole.
FUNCTIONAL: dict[str, Transform] = {
    "dual numbers made within": _dual_numbers,
    "dual numbers over backward": _forward_over_reverse,
    "linearize": _linearize,
    "grad": lambda f, x, t: grad(_loss(f))(x),
    "vjp": lambda f, x, t: vjp(f, x)[1](f(t)),
    "jvp": lambda f, x, t: jvp(f, (x,), (t,)),
    "jacrev": lambda f, x, t: jacrev(f)(x),
    "jacfwd": lambda f, x, t: jacfwd(f)(x),
    "hessian": lambda f, x, t: hessian(_loss(f))(x),
    "jacfwd of jacfwd": lambda f, x, t: jacfwd(jacfwd(_loss(f)))(x),
    "jacrev of jacrev": lambda f, x, t: jacrev(jacrev(_loss(f)))(x),
    "jacrev of jacfwd": lambda f, x, t: jacrev(jacfwd(_loss(f)))(x),
    "grad of grad": lambda f, x, t: grad(lambda y: (grad(_loss(f))(y) * t).sum())(x),
    "jvp of jvp": lambda f, x, t: jvp(lambda y: jvp(f, (y,), (t,))[1], (x,), (t.cos(),)),
    "jvp of grad": lambda f, x, t: jvp(grad(_loss(f)), (x,), (t,)),
    "grad of jvp": lambda f, x, t: grad(lambda y: jvp(_loss(f), (y,), (t,))[1])(x),
    "grad of grad of grad": lambda f, x, t: grad(
        lambda z: (grad(lambda y: (grad(_loss(f))(y) * t).sum())(z) * t).sum()
    )(x),
    "vmap": _vmap,
    "vmap of vmap": lambda f, x, t: vmap(vmap(f))(torch.stack((_directions(x), _directions(t)))),
    "vmap of grad": lambda f, x, t: vmap(grad(_loss(f)))(_directions(x)),
    "vmap of vjp": lambda f, x, t: vmap(lambda u: vjp(f, x)[1](u))(_directions(f(x))),
    "vmap of jvp": lambda f, x, t: vmap(lambda u: jvp(f, (x,), (u,)))(_directions(t)),
    "vmap of hessian": lambda f, x, t: vmap(hessian(_loss(f)))(torch.stack((x, t))),
    "grad of vmap": lambda f, x, t: grad(lambda y: vmap(f)(torch.stack((y, y * t))).sin().sum())(x),
    "jvp of vmap": lambda f, x, t: jvp(vmap(f), (torch.stack((x, t)),), (torch.stack((t, x)),)),
}
