"""The scheduler_config.json of a diffusers folder as a schedule, a prediction and options; and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.core.registry import unknown
from sfumato.diffusion.constraints import Dynamic, Static, ThresholdConfig
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.schedules import Discrete, ScheduleConfig
from sfumato.systems.config import StageConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.start import FromNoise

__all__ = ["Sampling", "ddim_config", "sampling_of"]

Knobs = dict[str, bool | int | float | str | None]
FORMULAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
VARIANCES = {"fixed_small": "small", "fixed_large": "large"}
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "PNDMScheduler": "plms",
    "UniPCMultistepScheduler": "unipc",
}
"""Class of diffusers -> our sampler."""
DROPPING = ("dpmpp_2m", "unipc")  # lay out one step more than they take
KARRAS = ("euler", "euler_ancestral", "heun")  # take times that are no whole numbers
SHAPED = ("dpmpp_2m", "euler", "heun", "unipc")  # read the options that follow; others pass them over
SHAPES = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential"}
UNKNOWN_SHAPES = ("use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
CLIPPING = ("ddim", "ddpm", "lcm")
CLEAN_END = ("ddim", "plms")  # end where set_alpha_to_one says; the files of others say it, too


@dataclass(frozen=True)
class Sampling:
    """What a scheduler says of a system."""

    schedule: ScheduleConfig
    parameterization: str
    defaults: SampleOptions


def sampling_of(config: Mapping[str, Any], *, steps: int, guidance: CFG) -> Sampling:
    """The schedule, the prediction and the default walk of a scheduler's config.

    Raises: ValueError in one line for a class, formula, prediction or choice of levels that is unknown.
    """
    kind = str(config.get("_class_name", "DDIMScheduler"))
    sampler = _known("scheduler class", SAMPLERS, kind)
    table = config.get("trained_betas")
    schedule = Discrete(
        formula="betas"
        if table
        else _known("beta_schedule", FORMULAS, config.get("beta_schedule", "linear")),
        steps=int(config.get("num_train_timesteps", 1000)),
        start=None
        if table or config.get("beta_schedule") == "squaredcos_cap_v2"
        else config.get("beta_start", 1e-4),
        end=None
        if table or config.get("beta_schedule") == "squaredcos_cap_v2"
        else config.get("beta_end", 0.02),
        values=tuple(table or ()),
        zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )
    told = config.get("timestep_spacing", "leading" if sampler in ("ddim", "ddpm", "plms") else "linspace")
    spacing, knobs = _shaped(config, sampler, told) or _spaced(config, sampler, told)
    variance = str(config.get("variance_type", "fixed_small")).removesuffix("_log")
    if sampler == "ddpm" and variance != "learned_range":
        variance = _known("variance_type", VARIANCES, variance)
    clips = sampler in CLIPPING and config.get("clip_sample", sampler != "lcm")
    return Sampling(
        schedule,
        _known("prediction_type", PREDICTIONS, config.get("prediction_type", "epsilon")),
        SampleOptions(
            sampler=sampler,
            knobs={"variance": "large"} if sampler == "ddpm" and variance == "large" else {},
            steps=steps,
            spacing=spacing,
            spacing_knobs=knobs,
            guidance=guidance,
            start=FromNoise("sigma" if sampler in KARRAS and told != "leading" else "unit"),
            threshold=_threshold(config, clips=bool(clips)),
        ),
    )


def _spaced(config: Mapping[str, Any], sampler: str, spacing: str) -> tuple[str, Knobs]:
    """The levels that `timestep_spacing` says."""
    knobs: Knobs = {}
    if sampler == "lcm":
        spacing, knobs["original"] = "distilled", int(config.get("original_inference_steps", 50))
    if sampler in KARRAS and spacing == "linspace":
        knobs["rounding"] = False
    if spacing == "leading" and config.get("steps_offset"):
        knobs["offset"] = int(config["steps_offset"])
    if sampler in DROPPING and spacing != "trailing":
        knobs["drop_last"] = True
    if sampler in CLEAN_END and not config.get("set_alpha_to_one", True):
        knobs["clean_end"] = False
    return spacing, knobs


def _shaped(config: Mapping[str, Any], sampler: str, spacing: str) -> tuple[str, Knobs] | None:
    """The levels of an option that goes by sigma / alpha; None if there is none.

    Between the ends of `timestep_spacing`, or of the whole table where the solver drops the last step.
    Raises: ValueError for an option that is not known here, or several.
    """
    asked = [name for name in (*SHAPES, *UNKNOWN_SHAPES) if sampler in SHAPED and config.get(name)]
    if not asked:
        return None
    if len(asked) > 1 or asked[0] not in SHAPES:
        raise ValueError(
            f"the scheduler's config has {' and '.join(asked)}; allowed: one of {', '.join(SHAPES)}; set the "
            "rest to false"
        )
    knobs: Knobs = {n: float(v) for n in ("sigma_min", "sigma_max") if (v := config.get(n)) is not None}
    if sampler in DROPPING and asked[0] == "use_karras_sigmas":
        # Elsewhere diffusers cuts the decimals off, so that rounding decides at the ends; here they are read.
        knobs["rounding"] = config.get("beta_schedule") != "squaredcos_cap_v2"
    elif sampler not in DROPPING and spacing != "linspace":
        knobs["ends"] = spacing
        if spacing == "leading" and config.get("steps_offset"):
            knobs["offset"] = int(config["steps_offset"])
    return SHAPES[asked[0]], knobs


def _threshold(config: Mapping[str, Any], *, clips: bool) -> ThresholdConfig | None:
    if config.get("thresholding"):
        ratio, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        return Dynamic(float(ratio), float(most))
    return Static(float(config.get("clip_sample_range", 1.0)), keep_eps=True) if clips else None


def ddim_config(stage: StageConfig) -> dict[str, object]:
    """A DDIMScheduler's config for a stage.

    Raises: ValueError if diffusers has no such scheduler.
    """
    schedule, predictions = stage.schedule, {ours: theirs for theirs, ours in PREDICTIONS.items()}
    formulas = {ours: theirs for theirs, ours in FORMULAS.items()}
    if not isinstance(schedule, Discrete) or schedule.rescale_timesteps:
        raise ValueError(f"diffusers' DDIM has no schedule {schedule.kind!r}; save it as a sfumato system")
    formula = {"betas": "trained_betas"}.get(schedule.formula) or _known(
        "formula", formulas, schedule.formula
    )
    options, knobs = stage.defaults, stage.defaults.spacing_knobs
    shapes = {ours: theirs for theirs, ours in SHAPES.items()} if options.sampler in SHAPED else {}
    shape, original = shapes.get(options.spacing), knobs.get("original")
    spacing = options.spacing if shape is None else knobs.get("ends") or "linspace"
    start, end = (schedule.start, schedule.end) if schedule.start is not None else _ends(schedule)
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.steps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "linear" if schedule.values else formula,
        "trained_betas": list(schedule.values) or None,
        "rescale_betas_zero_snr": schedule.zero_snr,
        "prediction_type": _known("parameterization", predictions, stage.parameterization),
        "timestep_spacing": spacing if spacing in ("leading", "linspace") else "trailing",
        "steps_offset": knobs.get("offset", 0) if spacing == "leading" else 0,
        "set_alpha_to_one": bool(knobs.get("clean_end", True)),
        "clip_sample": isinstance(options.threshold, Static),
        **({"original_inference_steps": original} if original else {}),
        **({shape: True} if shape else {}),
        **{name: knobs[name] for name in ("sigma_min", "sigma_max") if shape and name in knobs},
        "clip_sample_range": options.threshold.limit if isinstance(options.threshold, Static) else 1.0,
    }


def _ends(schedule: Discrete) -> tuple[float, float]:
    """First and last beta of a table that has its formula's own."""
    bar = schedule.alpha_bar
    return float(1 - bar[0]), float(1 - bar[-1] / bar[-2])


def _known(kind: str, table: Mapping[str, str], name: object) -> str:
    if name not in table:
        raise ValueError(unknown(kind, str(name), list(table)))
    return table[str(name)]
