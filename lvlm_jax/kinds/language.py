"""Stages that train a vision-language model to write what stands in its data."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lvlm_jax import mesh as meshes
from lvlm_jax.config import ConfigError
from lvlm_jax.evaluate import run as evaluations
from lvlm_jax.hub.configs import public_config
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.infer.system import System
from lvlm_jax.kinds.kind import Asking, Kind
from lvlm_jax.kinds.writing import instruction_of, template_of
from lvlm_jax.models.lvlm import LVLM
from lvlm_jax.params import is_stacked
from lvlm_jax.train import flops, losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """z_loss: see `losses.language_loss`; 0 is off."""

    z_loss: float = 0.0


def within_context(recipe: Any, name: str, stage: Any) -> None:
    """Raises ConfigError for rows that are longer than what the language model knows."""
    if stage.data.length > recipe.model.llm.context:
        raise ConfigError(
            f"stages.{name}.data.length={stage.data.length} is beyond model.llm.context={recipe.model.llm.context}, "
            "the positions that the language model knows"
        )


def sweep(model: Any) -> dict[str, Any]:
    """How the loss goes over positions.

    On accelerators and of scanned models every chunk of positions is computed, so that all steps take equally long;
    else only those that hold a label.
    """
    skip = not model.scan and meshes.platform() == "cpu"
    return {"chunk": 256 if model.scan else 64, "skip_unlabelled": skip}


def _loss(model: Any, settings: Settings, head_trained: bool, shards: int) -> Callable:
    def language(params: dict, batch: Any) -> tuple:
        hidden, _ = model.apply({"params": params}, batch)
        kernel = model.apply({"params": params}, method="head_kernel")
        loss, weight, correct = losses.language_loss(
            hidden,
            kernel,
            batch.tokens,
            batch.weights,
            head_trained=head_trained,
            shards=shards,
            softcap=model.config.llm.final_softcap,
            z_loss=settings.z_loss,
            **sweep(model),
        )
        return loss, weight, {"correct": correct}

    return language


def _flops(recipe: Any, stage: Any, params: dict) -> float:
    data, mask = stage.data, stage.stage("x").mask(params)
    sizes = {"rows": data.rows, "length": data.length, "pictures": data.pictures, "senses": data.senses}
    return flops.step_flops(recipe.model.lvlm, params, mask, **sizes)


def _holds(recipe: Any, stage: Any) -> dict[str, Any]:
    """Whether several visual tokens may fill one position, and how long an instruction is: facts of a recipe."""
    model = recipe.model
    limited = model.image.tiles is not None and model.image.tiles.most is not None
    blend = stage.data.pictures > 0 and (limited or model.video.pool != "none")
    return {"blend": blend, "instruction": model.instruction.length if model.instruction else 0}


def system_of(recipe: Any, params: dict, tokenizer: Any, dtype: Any, mesh: Any = None) -> System:
    """The model as something to ask, adapters merged before."""
    m = recipe.model
    return System(
        model=LVLM(m.lvlm, dtype=dtype, scan=is_stacked(params)),
        params=params,
        tokenizer=tokenizer,
        spec=m.image,
        template=template_of(m),
        image_token_id=m.image_token_id,
        mesh=mesh,
        name=recipe.name,
        video=m.video,
        instruction=instruction_of(m),
    )


def _evaluate(recipe: Any, params: dict, asking: Asking) -> evaluations.Result:
    ask = recipe.evaluation
    return evaluations.evaluate(
        system_of(recipe, params, asking.tokenizer, asking.dtype, asking.mesh),
        asking.samples,
        scores=ask.scores,
        batch_rows=ask.rows,
        max_new_tokens=ask.max_new_tokens,
        sampling=Sampling(temperature=ask.temperature, seed=recipe.seed),
        progress=asking.out is not None,
        out=asking.out,
        data=ask.data.label,
    )


def _hint(folder: Any, samples: list[dict]) -> str:
    shown = ((kind, s[f"{kind}s"][0]) for s in samples for kind in ("image", "video") if s.get(f"{kind}s"))
    flag, picture = next(shown, ("image", "PICTURE"))
    return f"lvlm chat {folder} --{flag} {picture}"


def _exported(recipe: Any) -> dict[str, Any]:
    m = recipe.model
    out = {"config": m.lvlm, "image_spec": m.image, "template": template_of(m), "video": m.video}
    return out | {"instruction": instruction_of(m)}


KIND = Kind(
    int8=True,
    model=lambda recipe, options: LVLM(recipe.model.lvlm, **options),
    loss=_loss,
    sizes=lambda recipe: recipe.model.lvlm,
    settings=Settings,
    check=within_context,
    visual_tokens=lambda recipe: recipe.model.lvlm.visual_tokens,
    senses=lambda recipe: recipe.model.lvlm.specs,
    holds=_holds,
    flops=_flops,
    evaluate=_evaluate,
    hint=_hint,
    exported=_exported,
    public=lambda recipe: public_config(recipe.model.lvlm, recipe.model.image_token_id, recipe.model.image),
)
"""Next-token cross-entropy of a vision-language model."""
