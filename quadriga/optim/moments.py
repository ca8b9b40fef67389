"""Adam whose moments are stored in a separate dtype (`optimizer.state_dtype`) and computed in float32.

The optimizers of torch store both moments in the dtype of the parameters and compute in it. Here each step processes
the parameters in buckets: it makes float32 copies of the narrower tensors, updates the copies with torch's functional
Adam, and rounds them to nearest. So only the copies of one bucket exist, never those of the whole model:

| parameters | moments  | bytes per parameter (weight + moments) | float32 copies of one bucket     |
|------------|----------|----------------------------------------|----------------------------------|
| float32    | bfloat16 | 4 + 4, instead of 4 + 8                | both moments                     |
| bfloat16   | bfloat16 | 2 + 4                                  | weights, gradients, both moments |
| bfloat16   | float32  | 2 + 8, instead of 2 + 4                | weights, gradients               |

On CUDA with `fused`, `adam_kernel` does all of this in one pass without copies, with the division by `grad_scale`.

A bucket has `UPDATE_BUCKET` elements of this rank's shards (64 MiB per copy), or one parameter's shard if that is
larger. In addition, `foreach` and `for-loop` make temporary tensors of the same size, as in torch; `fused` makes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from quadriga.config.schema import UPDATE_BUCKET
from quadriga.optim.adam_kernel import adam_update
from quadriga.optim.rounding import place_of, round_stochastically
from quadriga.tensors import plain_data, to_local
from quadriga.units import grouped


class AdamWithMomentsIn(torch.optim.Adam):
    """Adam (arXiv 1412.6980) or, with `decoupled_weight_decay`, AdamW (arXiv 1711.05101).

    The state has the names and shapes of torch's: `step` (float32), `exp_avg` and `exp_avg_sq`, both in `dtype`.
    Parameters can be plain tensors or DTensors, float32 or bfloat16. A step that `found_inf` skips (`skip_update_if`)
    leaves the state bit for bit unchanged, because a conversion to float32 and back is exact.

    Args:
        dtype: float32 or bfloat16; None: that of each parameter.
        names: by parameter, for stochastic rounding of bfloat16 weights and moments (`rounding`); None: to nearest.
        seed: of stochastic rounding.
        options: those of `torch.optim.Adam`, except `amsgrad`, `maximize`, `capturable` and `differentiable`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        dtype: torch.dtype | None,
        names: Mapping[Any, str] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self.moments_dtype, self.names, self.seed = dtype, names, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["fused"] and parameters and to_local(parameters[0]).is_cuda:
                self._update_in_one_kernel(group, parameters)
                continue
            for bucket in grouped(parameters, lambda parameter: to_local(parameter).numel(), UPDATE_BUCKET):
                self._update(group, bucket)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(parameter, group) for parameter in parameters]
        held = (
            [plain_data(to_local(parameter)) for parameter in parameters],
            [to_local(state["exp_avg"]) for state in states],
            [to_local(state["exp_avg_sq"]) for state in states],
        )
        weights, means, squares = wide = [[each.float() for each in column] for column in held]
        adam(
            weights,
            [to_local(each.grad).float() for each in parameters if each.grad is not None],  # `step` selected these
            means,
            squares,
            [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            fused=group["fused"],
            found_inf=getattr(self, "found_inf", None),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if self.names is not None:
            for parameter, state, *pairs in zip(parameters, states, *map(zip, wide, held), strict=True):
                place = place_of(self.seed, self.names[parameter], parameter)
                round_stochastically(pairs, place, int(state["step"]))
            return
        for column, computed in zip(held, wide, strict=True):
            for narrow, result in zip(column, computed, strict=True):
                if result is not narrow:
                    narrow.copy_(result)

    def _update_in_one_kernel(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(parameter, group) for parameter in parameters]
        found_inf, (beta1, beta2) = getattr(self, "found_inf", None), group["betas"]
        steps = torch.stack([state["step"] for state in states]) + 1
        exact = steps.double()
        places = []
        if self.names is not None:
            places = [place_of(self.seed, self.names[parameter], parameter) for parameter in parameters]
        adam_update(
            [plain_data(to_local(parameter)) for parameter in parameters],
            [to_local(parameter.grad) for parameter in parameters if parameter.grad is not None],
            [to_local(state["exp_avg"]) for state in states],
            [to_local(state["exp_avg_sq"]) for state in states],
            steps,
            torch.stack((1 - beta1**exact, (1 - beta2**exact).sqrt()), dim=1).float(),
            found_inf,
            getattr(self, "grad_scale", None),
            [group["lr"], beta1, beta2, group["eps"], group["weight_decay"]],
            group["decoupled_weight_decay"],
            [number for place in places for number in astuple(place)],
        )
        done = torch.ones_like(steps[0]) if found_inf is None else 1 - found_inf
        torch._foreach_add_([state["step"] for state in states], [done] * len(states))

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # On the same device as in torch's Adam: the fused kernel counts on the device, the others on the host.
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
        return state
