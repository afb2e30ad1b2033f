"""Options of training an adapter instead of all weights."""

from dataclasses import dataclass, field
from math import inf
from typing import ClassVar


@dataclass(kw_only=True)
class AdapterArguments:
    """Options of adapters (LoRA), which any stage takes that names the parts it can adapt."""

    lora_rank: int = field(
        default=0, metadata={"help": "Train an adapter (LoRA) of this rank instead of all weights; 0: all weights."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapter times its rank; if unset, the rank."}
    )
    lora_targets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to adapt: all blocks of a part (`decoder`), or some layers of it (`decoder.to_q`); if unset,"
            " the decoder or the prior."
        },
    )

    LORA_LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"lora_rank": (0, inf), "lora_alpha": (1e-9, inf)}
    ADAPTED_PARTS: ClassVar[tuple[str, ...]] = ()  # of the stage, the default first
    START: ClassVar[str] = ""  # option with the model that an adapter is for
    EXAMPLE: ClassVar[str] = "down_proj"  # layer of the default part

    def check_adapter(self) -> None:
        """Raise a ValueError if options of adapters do not fit the stage or each other."""
        if not self.lora_rank:
            for name in ("lora_alpha", "lora_targets"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` is for adapters: set `lora_rank` too, for example to 8.")
            return
        if not self.ADAPTED_PARTS:
            raise ValueError("`lora_rank` is for stages that adapt a trained model; this one trains all weights.")
        if getattr(self, self.START) is None:
            raise ValueError(f"`lora_rank` needs a trained model to adapt: set `{self.START}` to its pipeline.")
        for target in self.lora_targets:
            if target.partition(".")[0] not in self.ADAPTED_PARTS:
                raise ValueError(
                    f"`lora_targets` must name {' or '.join(self.ADAPTED_PARTS)}, or layers of it, such as"
                    f" {self.ADAPTED_PARTS[0]}.{self.EXAMPLE}, got {target!r}."
                )

    @property
    def adapted_parts(self) -> set[str]:
        """The parts that get an adapter; empty if all weights are trained."""
        if not self.lora_rank:
            return set()
        return {target.partition(".")[0] for target in self.lora_targets or self.ADAPTED_PARTS[:1]}
