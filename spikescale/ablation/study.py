"""What an ablation consists of: one pretraining run for each variant and seed, and which of them are done."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spikescale.config import RunConfig, load_config
from spikescale.config.schema import Variant
from spikescale.errors import UserError
from spikescale.files import read_json
from spikescale.training.records import RESULT_FILE

VARIANTS: tuple[str, ...] = get_args(Variant)
# Settings that change neither what is learnt nor how it is judged.
INDIFFERENT = (
    "name",
    "output",
    "resume",
    "mlflow",
    "faults",
    "data.verify",
    "train.threads",
    "train.log_every",
)


@dataclass(frozen=True)
class AblationRun:
    """One run: its settings, and the words over the file that make them."""

    variant: str
    seed: int
    config: RunConfig
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.config.folder

    def result(self) -> dict[str, Any] | None:
        """What it came to; None while it is not finished.

        Raises UserError when the folder holds a run of other settings.
        """
        settings = self.folder / "config.yaml"
        if not settings.exists():
            return None
        self._require_same(settings)
        if not (self.folder / RESULT_FILE).exists():
            return None
        result: dict[str, Any] = read_json(self.folder / RESULT_FILE)
        return result if result["step"] == self.config.train.steps else None

    def _require_same(self, file: Path) -> None:
        wanted = _flat(self.config.model_dump(mode="json"))
        try:
            found = _flat(OmegaConf.to_container(OmegaConf.load(file)))
        except (OSError, ValueError, OmegaConfBaseException) as error:
            raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
        for key, value in wanted.items():
            if any(key == name or key.startswith(f"{name}.") for name in INDIFFERENT):
                continue
            # What the run itself settled: the tokenizer's ids, the hardware's precision.
            if (key, value) in (("model.vocab_size", None), ("train.precision", "auto")):
                continue
            if key in found and found[key] != value:
                raise UserError(
                    f"{file}: {key} = {found[key]}, and this ablation has {value}: choose another name, or "
                    "remove the folder"
                )


def plan_runs(
    path: Path, variants: Sequence[str], seeds: Sequence[int], settings: Sequence[str] = ()
) -> list[AblationRun]:
    """The runs, seed by seed, so that every variant has as many as any other at all times but one.

    The run file's name is the ablation's; its runs go to `<output>/<name>/<variant>-seed<n>`. A seed is that
    of the initial weights and of the order of the data. Raises UserError for a variant that there is not.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants {variant}: must be one of {', '.join(VARIANTS)}")
    if len(set(variants)) < len(variants) or not variants:
        raise UserError(f"--variants {','.join(variants)}: name each variant once, and at least one")
    base = load_config(path, [*settings, *_variant_words(variants[0])])
    runs = []
    for seed in seeds:
        for variant in variants:
            words = (
                *settings,
                *_variant_words(variant),
                f"train.seed={seed}",
                f"data.seed={seed}",
                f"name={variant}-seed{seed}",
                f"output={base.folder}",
            )
            runs.append(AblationRun(variant, seed, load_config(path, words), words))
    return runs


def _variant_words(variant: str) -> tuple[str, ...]:
    # A model without neurons has no binary embedding either; the others have what the file says.
    return (f"model.variant={variant}", *(("model.binary_embedding=false",) if variant == "rwkv" else ()))


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    return {
        key: value
        for name, inner in settings.items()
        for key, value in _flat(inner, f"{prefix}{name}.").items()
    }
