"""Watch the torch model at work: norms by hooks, custom ops where torch dispatches them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Array
from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.export.bundle.narrow_cache import TOPS
from deepseek_trt.validate.backends.probes import GAP, Probes
from deepseek_trt.validate.numbers.routing import Flip, Router, closest_gap, differing_tokens, margin
from deepseek_trt.validate.steps import Step

Keep = Callable[[str, Tensor], None]
# A layer, its router, the logits, what the router made of them; gives what is used instead.
Route = Callable[[int, Router, Tensor, Any], Any]
# A layer, its new latents, format and group of their codes; gives what is cached instead.
Cache = Callable[[int, Tensor, str, int], Tensor]
MLA_NARROW = ("MlaPrefillNarrow", "MlaDecodeNarrow")


def _as_it_is(layer: int, latent: Tensor, format: str, group: int) -> Tensor:
    return latent


def rounded_as(latents: Tensor, theirs: Tensor, format: str, group: int, allowed: float) -> Tensor:
    """The latents [T, D] with those of `theirs` [T, L], each a row of a narrow cache, that may be what they are rounded
    to: every number within half a step of its code, and what may be between the runs, `allowed` of the largest latent.

    A row that cannot be stays as it is, and is then found to differ.
    """
    own, top = latents[:, : theirs.shape[1]].contiguous(), TOPS[format]
    grouped = own.view(len(own), -1, group)
    scale = grouped.abs().amax(-1, keepdim=True) / top
    step = scale.expand_as(grouped)
    if format == "fp8":  # 3 bits of mantissa, and 2^-9 below 2^-6
        exponent = torch.frexp(grouped.abs() / scale.clamp(min=torch.finfo(scale.dtype).tiny))[1] - 1
        step = scale * torch.exp2(exponent.clamp(min=-6) - 3.0)
    off = (own - theirs).abs()
    fits = (off <= step.flatten(-2) / 2 + allowed * own.abs().max()).all(-1, keepdim=True)
    return torch.cat([torch.where(fits, theirs, own), latents[:, theirs.shape[1] :]], dim=-1)


class TorchWatcher:
    """Fills `probes`; with `follow`, near-tie router choices are those of that other run, and `flips` lists them. So
    are the codes of a narrow cache, where the other's may be what a latent is rounded to.

    `allowed` gives a layer's tolerance on router logits, relative to the largest of them, `allowed_latents` that on
    latents.
    """

    def __init__(
        self,
        probes: Probes,
        follow: Probes | None = None,
        allowed: Callable[[int], float] = lambda layer: 0.0,
        allowed_latents: Callable[[int], float] = lambda layer: 0.0,
    ) -> None:
        self.probes, self._follow, self._allowed = probes, follow, allowed
        self._allowed_latents = allowed_latents
        self.flips: list[Flip] = []

    @contextmanager
    def watch(self, session: Session, index: int, step: Step) -> Iterator[None]:
        model: Any = session.model  # type: ignore[attr-defined]  # only torch sessions are watched

        def keep(name: str, value: Tensor) -> None:
            self.probes.keep(index, step, name, array_of(value))

        with ExitStack() as stack:
            for layer, module in enumerate(model.model.layers):
                stack.enter_context(_seen(module.input_layernorm, f"hidden.{layer}", keep))
                stack.enter_context(_seen(module.post_attention_layernorm, f"after_attention.{layer}", keep))
            stack.enter_context(_last_output(model, keep))
            route, cache = (functools.partial(of, index, step) for of in (self.route, self.cached))
            stack.enter_context(OpWatch(keep, route, cache=cache))
            yield

    def cached(self, index: int, step: Step, layer: int, latent: Tensor, format: str, group: int) -> Tensor:
        """What a narrow cache is given of new tokens: the latents, or what the other run rounded them to."""
        theirs = self._follow.cached.get((index, layer)) if self._follow else None
        if theirs is None:
            return latent
        live = torch.from_numpy(step.live.reshape(-1).nonzero()[0])
        given = latent.flatten(0, 1).clone()
        given[live] = rounded_as(given[live], torch.from_numpy(theirs), format, group, self._allowed_latents(layer))
        return given.view(latent.shape)

    def route(self, index: int, step: Step, layer: int, router: Router, logits: Tensor, own: Any) -> Any:
        """The router's outputs for this layer: its own, or those with near ties decided as `follow` has them."""
        if self._follow is not None:
            self.probes.keep(index, step, f"{GAP}.{layer}", array_of(closest_gap(logits, router)))
        theirs = self._follow.steps.get(index, {}).get(f"router_ids.{layer}") if self._follow else None
        if theirs is None:
            return own
        live = torch.from_numpy(step.live.reshape(-1).nonzero()[0])
        ids, wanted = own[1].clone(), torch.from_numpy(theirs)
        for token in differing_tokens(own[1][live], wanted):
            row = live[token]
            least = margin(logits[row], wanted[token], router)
            flip = Flip(index, layer, token, _ids(own[1][row]), _ids(wanted[token]), least, self._allowed(layer))
            self.flips.append(flip)
            if flip.near_tie:
                ids[row] = wanted[token]
        return (router.weights_of(logits, ids), ids) if not torch.equal(ids, own[1]) else own


class OpWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Keeps what goes into and comes out of the custom ops; layers are counted by their attention, from first_layer."""

    def __init__(self, keep: Keep, route: Route, first_layer: int = 0, cache: Cache = _as_it_is) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keep, self._route, self._layer, self._cache = keep, route, first_layer - 1, cache

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", None) != DOMAIN:
            return func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        if name in MLA_NARROW:
            return self._attend_narrow(func, args)
        out = func(*args, **(kwargs or {}))
        if name in ("MlaPrefill", "MlaDecode"):
            self._layer += 1
            self._all({"query": args[0], "latent": args[1], "attended": out[0]})
        elif name in ("MoeRouter", "MoeBiasedRouter"):
            router = Router(args[1:]) if name == "MoeRouter" else Router(args[2:], args[1])
            out = self._route(self._layer, router, args[0], out)
            self._all({"router_logits": args[0], "router_weights": out[0], "router_ids": out[1]})
        elif name == "MoeExperts":
            self._all({"experts": out})
        return out

    def _attend_narrow(self, func: Any, args: tuple[Any, ...]) -> Any:
        self._layer += 1
        latent = self._cache(self._layer, args[1], *args[-2:])  # format and group come last
        out = func(args[0], latent, *args[2:])
        self._all({"query": args[0], "latent": args[1], "attended": out[0]})
        return out

    def _all(self, values: dict[str, Tensor]) -> None:
        for place, value in values.items():
            self._keep(f"{place}.{self._layer}", value)


@contextmanager
def _seen(module: torch.nn.Module, name: str, keep: Keep) -> Iterator[None]:
    """Keep the module's input."""
    handle = module.register_forward_pre_hook(lambda _, inputs: keep(name, inputs[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _last_output(model: Any, keep: Keep) -> Iterator[None]:
    """Keep the last layer's output where the graph has all tokens of it: before prefill picks the last ones."""
    last = model.model.layers[-1]
    state: dict[str, Tensor] = {}
    before = last.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: state.update(x=inputs[0]))
    after = last.mlp.register_forward_hook(
        lambda _, inputs, out: keep(f"hidden.{len(model.model.layers)}", state["x"] + out)
    )
    try:
        yield
    finally:
        before.remove()
        after.remove()


def array_of(value: Tensor) -> Array:
    """float32, or ids as they are."""
    array: Array = (value if value.dtype == torch.int32 else value.float()).numpy()
    return array


def _ids(row: Tensor) -> tuple[int, ...]:
    return tuple(sorted(int(i) for i in row))
