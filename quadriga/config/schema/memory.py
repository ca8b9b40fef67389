"""[activation_checkpoint], [compile], [memory_estimation] and [estimate]: memory against time, and foresight."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quadriga.config.schema.section import Name, Names, Section, Share


class ActivationCheckpoint(Section):
    """Recompute: forget activations in the forward pass and compute them again in the backward pass."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """Which blocks recompute: some of their work, all of it, as much as a budget demands, or nothing."""

    selective_ac_option: Annotated[str, Field(pattern=r"^(op|[0-9]{1,9})$", examples=["op", "2"])] = "2"
    """With `selective`: `op` recomputes cheap operations of every block, `N` the whole of every Nth of a rank."""

    per_op_sac_force_recompute_mm_shapes_by_fqns: Names = ("moe.router.gate",)
    """With `op`: linear layers whose matrix products are recomputed even so, by parts of their names."""

    early_stop: bool = False
    """Stop recomputing a block as soon as all that is needed is there."""

    memory_budget: Share = 0.5
    """With `memory_budget`: share of the activation memory to keep, 0 as in `full`, 1 as in `none`; needs `compile`."""

    visualize_memory_budget_pareto: bool = False
    """Draw memory against recompute time while the budget is planned."""

    preserve_rng_state: bool = True
    """Give the recomputation the random numbers of the first computation."""

    determinism_check: Literal["default", "none"] = "default"
    """How recomputed values are compared with the first ones: `default` (shape, type, device) or `none`."""

    debug: bool = False
    """Keep records with which PyTorch explains a failed recomputation."""

    @property
    def recomputes(self) -> bool:
        """Whether a block's forward pass is done again; the compiler's way with `memory_budget` is another."""
        return self.mode in ("selective", "full")


class Compile(Section):
    """torch.compile."""

    enable: bool = False
    """Compile what `components` names."""

    components: tuple[Literal["model", "loss"], ...] = ("model", "loss")
    """What to compile: the blocks of the model, the loss."""

    backend: Name = "inductor"
    """Backend of torch.compile."""


class MemoryEstimation(Section):
    """A run that is not trained: it is estimated and rehearsed, as by `DRY_RUN=1 ... --rehearse`."""

    enable: bool = False
    """Estimate and rehearse instead of training, as `DRY_RUN=1 ... --rehearse` does."""

    disable_fake_mode: bool = False
    """Without effect: what is rehearsed holds nothing."""


class Estimate(Section):
    """What a dry run assumes."""

    device: Name | None = None
    """Device to plan for, by name (`H100`, `A100`, ...); none leaves out what depends on it."""
