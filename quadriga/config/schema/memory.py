"""[activation_checkpoint], [compile], [memory_estimation] and [estimate]: recompute, compilation, estimates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quadriga.config.schema.section import Name, Names, Section, Share


class ActivationCheckpoint(Section):
    """Recompute: free activations in the forward pass and compute them again in the backward pass."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """What is recomputed: some blocks or operations, all blocks, as much as a memory budget requires, or nothing."""

    selective_ac_option: Annotated[str, Field(pattern=r"^(op|[0-9]{1,9})$", examples=["op", "2"])] = "2"
    """With `selective`: `op` recomputes cheap operations of every block, `N` every Nth block of a rank."""

    per_op_sac_force_recompute_mm_shapes_by_fqns: Names = ("moe.router.gate",)
    """With `op`: linear layers whose matrix products are always recomputed, by parts of their names."""

    early_stop: bool = False
    """Stop recomputing a block as soon as all needed tensors exist."""

    memory_budget: Share = 0.5
    """With `memory_budget`: share of the activation memory to keep, from 0 (`full`) to 1 (`none`). Needs `compile`."""

    visualize_memory_budget_pareto: bool = False
    """Plot memory against recompute time while the compiler plans the budget."""

    preserve_rng_state: bool = True
    """Recompute with the random numbers of the first computation."""

    determinism_check: Literal["default", "none"] = "default"
    """How recomputed values are compared with the first ones: `default` (shape, type, device) or `none`."""

    debug: bool = False
    """Keep records with which PyTorch explains a failed recomputation."""

    @property
    def recomputes(self) -> bool:
        """Whether the forward pass of a block runs again. With `memory_budget`, the compiler recomputes instead."""
        return self.mode in ("selective", "full")

    @property
    def per_operation(self) -> bool:
        """Whether a block that recomputes keeps the results of some operations, and not only its input."""
        return self.mode == "selective" and self.selective_ac_option == "op"

    def recomputes_block(self, number: int) -> bool:
        """Whether block `number` of a rank recomputes, counted from 1 over all its pipeline stages.

        With `selective` `N` these are blocks N, 2N, ...; 0 selects all blocks.
        """
        every_nth = self.mode == "selective" and not self.per_operation
        return self.recomputes and number % (int(self.selective_ac_option) or 1 if every_nth else 1) == 0


class Compile(Section):
    """torch.compile."""

    enable: bool | Literal["auto"] = False
    """Compile the `components`. With "auto": on GPUs, if no key refuses it; a resumed run keeps what was chosen."""

    components: tuple[Literal["model", "loss"], ...] = ("model", "loss")
    """The parts to compile: the blocks of the model, the loss."""

    backend: Name = "inductor"
    """Backend of torch.compile."""

    def compiles(self, component: Literal["model", "loss"]) -> bool:
        """Whether `component` is compiled. Until "auto" is decided (`Run.on_device`), nothing is."""
        return self.enable is True and component in self.components


class MemoryEstimation(Section):
    """Estimate and rehearse a run instead of training it, like `DRY_RUN=1 ... --rehearse`."""

    enable: bool = False
    """Estimate and rehearse instead of training, like `DRY_RUN=1 ... --rehearse`."""

    disable_fake_mode: bool = False
    """Without effect: a rehearsal always uses fake tensors."""


class EstimateAssumptions(Section):
    """Assumptions of estimates."""

    device: Name | None = None
    """Device to estimate for, by name (`H100`, `A100`, ...) or as a TOML file; none omits what depends on it."""
