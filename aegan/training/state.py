"""Everything a checkpoint holds: networks, averages, optimisers, and how far training is."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aegan import model_folder, schedules
from aegan.augment import Augmentation
from aegan.config import Schedule, TrainConfig, TrainingConfig, identity, with_new_names
from aegan.losses import OBJECTIVES
from aegan.metrics.features import RANDOM_FEATURES, installed_features
from aegan.networks import AEGAN
from aegan.networks.model import DISCRIMINATORS
from aegan.training import checkpoint
from aegan.training.training_log import TrainingLog


class TrainingState:
    """The four networks with optimisers, and the averages (EMA) of generator and encoder.

    A network that the arm does not use is absent (encoder) or frozen (a discriminator).
    """

    def __init__(self, config: TrainConfig, manifest: dict[str, Any], device: torch.device) -> None:
        options, objective = config.training, OBJECTIVES[config.training.arm]
        self._device = device
        self._config = {**identity(config), "dataset_sha256": manifest["dataset_sha256"]}
        self._fixed_num_steps = schedules.fixed_num_steps(config)
        self._sizes = {key: manifest[key] for key in ("image_size", "image_channels")}
        self._reading = {"fit": manifest["fit"], "value_range": manifest.get("value_range", "full")}
        self._classes = manifest["classes"] if config.model.num_classes else []
        torch.manual_seed(options.seed)
        self.model = AEGAN(
            config.model,
            **self._sizes,
            encoder=objective.has_encoder,
            discriminators=objective.judges_images or objective.judges_latents,
            packing=config.loss.packing,
        )
        self.ema = AEGAN(
            config.model, **self._sizes, encoder=objective.has_encoder, discriminators=False
        )
        self.ema.load_state_dict(self.model.state_dict(), strict=False)
        self.ema.eval().requires_grad_(False)
        for module in (self.model, self.ema):
            module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        discriminators = []
        for is_used, network in (
            (objective.judges_images, self.model.image_discriminator),
            (objective.judges_latents, self.model.latent_discriminator),
        ):
            if network is not None:
                network.requires_grad_(is_used)
                discriminators += list(network.parameters()) if is_used else []
        adam = partial(torch.optim.Adam, fused=True)
        self.optimizers = {
            "encoder_generator": adam(
                [
                    *self.model.generator.parameters(),
                    *(self.model.encoder.parameters() if self.model.encoder else ()),
                ],
            )
        }
        if discriminators:
            self.optimizers["discriminators"] = adam(discriminators)
        at_start = schedules.at(config, 0).training
        self.augmentation = Augmentation(  # of nothing, where no D_x is trained
            at_start.augmentation_probability * objective.judges_images,
            target=options.augmentation_target * objective.judges_images,
            images=options.augmentation_images,
            is_scheduled=isinstance(options.augmentation_probability, Schedule)
            and objective.judges_images,
        ).to(device)
        self.set_rates(at_start)
        self.step = 0  # encoder/generator updates done
        self.attempt = 0  # rollbacks so far; part of every random draw, so a retry differs
        self.seconds = 0.0  # of training
        self.log = TrainingLog()
        # In which all checkpoints of the run are judged, wherever it goes on.
        self.features = installed_features()
        self.start: dict[str, Any] | None = None  # whose weights it began with, if not random ones

    def set_rates(self, options: TrainingConfig) -> None:
        """Learning rates, betas and a scheduled augmentation of the next step, all numbers."""
        if self.augmentation.is_scheduled:
            self.augmentation.probability.fill_(options.augmentation_probability)
        rates = {
            "encoder_generator": options.learning_rate,
            "discriminators": options.discriminator_learning_rate,
        }
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"], group["betas"] = rates[name], (options.beta1, options.beta2)

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of this moment; see `aegan.training.checkpoint`."""
        state = {
            "config": self._config,
            "fixed_num_steps": self._fixed_num_steps,
            **self._sizes,
            **self._reading,
            "classes": self._classes,
            "attempt": self.attempt,
            "seconds": self.seconds,
            "log": self.log.as_json(),
            "features": self.features,
            "start": self.start,
            "torch": torch.__version__,
        }
        return checkpoint.save(folder, self.step, self._tensors(), state)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go back to a checkpoint, as `checkpoint.load` returns it; raises ConfigChangedError."""
        saved = {
            key: with_new_names(key, value) if isinstance(value, dict) else value
            for key, value in state["config"].items()
        }
        checkpoint.check_config(saved, self._config)
        checkpoint.check_num_steps(state, self._fixed_num_steps)
        for name, module in self._modules().items():
            module.load_state_dict(_under(tensors, name))
        for name, optimizer in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments: dict[int, dict[str, Tensor]] = {}
            for key, tensor in _under(tensors, f"optimizer.{name}").items():
                index, moment = key.split(".")
                like = parameters[int(index)]
                if tensor.shape == like.shape:
                    # The fused optimiser walks memory in order: moments need the layout of their
                    # parameter (channels last), or they are silently paired with other weights.
                    tensor = torch.empty_like(like, requires_grad=False).copy_(tensor)
                moments.setdefault(int(index), {})[moment] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.attempt = int(state["step"]), int(state["attempt"])
        self.seconds = float(state["seconds"])
        self.log = TrainingLog.from_json(state["log"], self._device)
        self.features = judged_in(state)
        self.start = state["start"]

    def is_finite(self) -> bool:
        """Whether every weight is a finite number."""
        norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        return bool(torch.stack(norms).isfinite().all())

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "ema": self.ema, "augmentation": self.augmentation}

    def _tensors(self) -> dict[str, Tensor]:
        named = {
            f"{module_name}.{name}": value
            for module_name, module in self._modules().items()
            for name, value in module.state_dict().items()
        }
        for name, optimizer in self.optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                for moment, value in moments.items():
                    named[f"optimizer.{name}.{index}.{moment}"] = value
        return named


def judged_in(state: dict[str, Any]) -> str:
    """The features that a checkpoint's scores were measured in; the first version had one kind."""
    return str(state.get("features", RANDOM_FEATURES))


def export_model(path: Path, folder: Path) -> dict[str, Any]:
    """Write a checkpoint's networks as a model that `aegan.load` reads.

    Returns the model's description (config.json). Raises CheckpointError, OSError.
    """
    tensors, state = checkpoint.load(path)
    arm = state["config"]["training"]["arm"]
    trained = OBJECTIVES[arm].networks
    judges = [name for name in DISCRIMINATORS if name in trained]

    def of(name: str, networks: Iterable[str]) -> dict[str, Tensor]:
        found = _under(tensors, name).items()
        return {key: tensor for key, tensor in found if key.split(".")[0] in networks}

    description = {
        "model": with_new_names("model", state["config"]["model"]),
        "image_size": state["image_size"],
        "image_channels": state["image_channels"],
        "fit": state["fit"],
        "value_range": state.get("value_range", "full"),
        "classes": state.get("classes", []),
        "has_encoder": "encoder" in trained,
        "discriminators": judges,
        "packing": with_new_names("loss", state["config"]["loss"])["packing"],
        "arm": arm,
        "step": state["step"],
        "dataset_sha256": state["config"]["dataset_sha256"],
    }
    averaged = ("generator", "encoder")
    return model_folder.write(
        folder,
        description,
        {"raw": of("model", averaged), "ema": of("ema", averaged)},
        of("model", judges),
    )


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a dotted prefix, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
