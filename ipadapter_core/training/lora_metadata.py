"""What a trained LoRA's file says of its making, in the words that other tools read: kohya's ss_… and modelspec."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..lora.algorithms import trainings
from ..models.unet import SD2, unet_of_width
from .collection import Sample
from .config import RunConfig, without_places
from .frozen import FrozenBase
from .objectives import Objective


def describe_training(
    config: RunConfig, base: FrozenBase, objective: Objective, samples: Sequence[Sample]
) -> dict[str, str]:
    """Metadata of a LoRA's file; the step count is added when it is saved. All values are texts, as safetensors asks."""
    lora, train, data, loss = config.lora, config.train, config.data, config.loss
    model = unet_of_width(int(base.unet.config.cross_attention_dim))
    version, architecture = "unknown", "unknown"
    if model is not None and model.published is not None:
        version, architecture = model.published.kohya, model.published.modelspec
        if objective.modelspec == "v" and model.published.velocity is not None:
            version, architecture = model.published.velocity
    settings = config.as_dict()
    for section in ("output", "watch", "adapter"):
        settings.pop(section)
    text_rate = (lora.text_learning_rate or train.lr) if lora.text_encoders else 0
    facts: dict[str, object] = {
        "trained_by": "ipadapter train",
        "settings": json.dumps(without_places(settings)),
        "ss_base_model_version": version,
        "ss_v2": model is SD2,
        "ss_sd_model_name": Path(base.folder).name,
        "ss_network_module": trainings()[lora.algorithm][1].network,
        "ss_network_dim": lora.rank or "from the file it started from",
        "ss_network_alpha": lora.alpha or lora.rank or "from the file it started from",
        "ss_network_args": json.dumps({"algo": lora.algorithm, "rs_lora": lora.rslora, "targets": lora.targets}),
        "ss_network_dropout": lora.dropout,
        "ss_learning_rate": train.lr,
        "ss_unet_lr": train.lr,
        "ss_text_encoder_lr": text_rate,
        "ss_optimizer": train.optimizer,
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": train.warmup,
        "ss_max_train_steps": train.steps,
        "ss_batch_size_per_device": train.batch,
        "ss_gradient_accumulation_steps": train.accumulate,
        "ss_gradient_checkpointing": train.checkpointing,
        "ss_mixed_precision": {"fp32": "no"}.get(train.precision, train.precision),
        "ss_seed": train.seed,
        "ss_max_grad_norm": train.clip,
        "ss_num_train_images": len(samples),
        "ss_resolution": f"({data.resolution}, {data.resolution})",
        "ss_enable_bucket": data.buckets,
        "ss_caption_dropout_rate": loss.drop_text,
        "ss_min_snr_gamma": loss.min_snr or None,
        "ss_noise_offset": loss.noise_offset or None,
        "ss_training_comment": config.output.trigger,
        "ss_tag_frequency": json.dumps({config.output.name: _tags(samples)}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": config.output.name,
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": objective.modelspec,
        "modelspec.resolution": f"{data.resolution}x{data.resolution}",
        "modelspec.trigger_phrase": config.output.trigger,
    }
    return {key: str(value) for key, value in facts.items() if value not in ("", None)}


def _tags(samples: Sequence[Sample]) -> dict[str, int]:
    """How often each comma-separated part of a caption occurs, the commonest thousand."""
    tags = Counter(tag.strip() for sample in samples for tag in sample.caption.split(",") if tag.strip())
    return dict(tags.most_common(1000))
