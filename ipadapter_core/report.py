"""What people read about an adapter: its facts, what it needs, and where it acts in a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .attention.patch import AdapterPatch
from .bake import check_adapter
from .checkpoints import AdapterSpec, AdapterWeights
from .errors import one_line
from .features import ENCODERS
from .models.sites import ModelLayout

LEFT_OUT = {
    "image_encoder": "an image encoder trained along with it; the one you load is used, so pictures differ from the training's "
    "unless you extract this group and load it as CLIP vision",
}

UNCONDITIONAL = {
    "same": ": both branches of guidance see the picture",
    "off": ": the negative branch of guidance sees no picture",
}


def spec_facts(spec: AdapterSpec) -> dict[str, object]:
    """The facts of an adapter as plain values, for JSON."""
    return {
        "family": spec.family,
        "base_model": spec.base_model,
        "tokens": spec.num_tokens,
        "token_dim": spec.token_dim,
        "layers": len(spec.layer_channels),
        "encoder": spec.encoder,
        "encoders": list(spec.encoders),
        "encoder_files": [file for files in _files(spec).values() for file in files],
        "feature": spec.feature,
        "feature_dim": spec.feature_dim,
        "unconditional": spec.unconditional,
        "lora_layers": spec.lora_layers,
        "released": list(spec.format.released),
        "advice": spec.format.advice,
        **dict(spec.options),
        "left_out": dict(spec.left_out),
    }


def describe_spec(spec: AdapterSpec, name: str) -> str:
    """A few lines on what the file is and which encoder and base model it needs."""
    reach, layers = spec.format.reach, len(spec.layer_channels)
    sizes = (
        f"{layers} cross-attentions, text width {spec.token_dim}"
        if reach.query == "projected"
        else f"{layers} layers, image tokens {spec.token_dim} wide"
    )
    tokens = str(spec.num_tokens or "as many as the encoder gives")
    lines = [
        one_line(name),
        f"  family         {spec.format.label}",
        f"  base model     {spec.base_model} ({sizes})",
        f"  image tokens   {tokens}{', made anew at every step' if reach.timed else ''}",
        f"  image encoder  {spec.encoder}: {spec.feature}, {spec.feature_dim} wide",
        f"  unconditional  {spec.unconditional.replace('_', ' ')}{UNCONDITIONAL.get(spec.unconditional, '')}",
    ]
    for encoder, files in _files(spec).items():
        which = f"{encoder}: " if len(spec.encoders) > 1 else ""
        lines.append(f"  encoder files  {which}{', '.join(files)}")
    if spec.lora_layers:
        lines.append(
            f"  LoRA inside    for {spec.lora_layers} layers of the model; the node Apply Face LoRA applies it"
        )
    if spec.format.advice:
        lines.append(f"  strength       {spec.format.advice}")
    if spec.format.released:
        lines.append(f"  released as    {'; '.join(spec.format.released)}")
    for group, count in spec.left_out.items():
        lines.append(
            f"  left out       {one_line(group)} ({count} tensors): {LEFT_OUT.get(group, 'no part of an adapter')}"
        )
    return "\n".join(lines)


def _files(spec: AdapterSpec) -> dict[str, tuple[str, ...]]:
    """What people have the encoders as, by their names."""
    return {name: ENCODERS[name].files for name in spec.encoders if name in ENCODERS}


def layout_facts(layout: ModelLayout) -> dict[str, object]:
    """Where image prompts act in a model, as plain values, for JSON."""
    return {
        "base_model": layout.name,
        "sites": {group: sum(site.group == group for site in layout.sites) for group in layout.groups},
        "channels": sorted({site.channels for site in layout.sites}),
        "token_dim": layout.token_dim,
        "steps": layout.model.steps,
        "guidance": layout.model.guidance,
    }


def describe_layout(layout: ModelLayout, name: str) -> str:
    """A few lines on what a model is and where image prompts act in it."""
    groups = (f"{sum(site.group == group for site in layout.sites)} {group}" for group in layout.groups)
    channels = sorted({site.channels for site in layout.sites})
    return "\n".join(
        (
            one_line(name),
            f"  base model     {layout.name}",
            f"  image prompts  at {len(layout.sites)} attentions ({', '.join(groups)}), {', '.join(map(str, channels))} channels wide",
            f"  text tokens    {layout.token_dim} wide",
            f"  usual          {layout.model.steps} steps, guidance {layout.model.guidance:g}",
        )
    )


def describe_fit(adapter: AdapterWeights, layout: ModelLayout, patches: Sequence[AdapterPatch] | None) -> str:
    """The sites of a model with their roles, and the weight of every applied image prompt there; None: no model is running.

    Raises IncompatibleAdapterError if the adapter does not fit the model.
    """
    check_adapter(adapter, layout)
    roles, layers = layout.model.roles, adapter.spec.format.reach.sites(layout)
    which = "all of them" if len(layers) == len(layout.sites) else f"{len(layers)} of them"
    lines = [f"{layout.name}: {len(layout.sites)} sites, this adapter fits {which}"]
    trained = adapter.spec.format.trained_on
    if trained and layout.name not in trained:
        lines.append(
            f"  experimental: it was trained for {' and '.join(sorted(trained))}, and for {layout.name} nobody has trained one: "
            "other strengths than the usual ones may suit it"
        )
    header = f"  {'site':<12} {'t':>3} {'key':>4} {'channels':>8}  {'role':<12}"
    lines.append(header + "".join(f" {f'prompt {i + 1}':>9}" for i in range(len(patches or ()))))
    for index, site in enumerate(layout.sites):
        role = "" if roles is None else roles.of(site)
        key = adapter.spec.format.keys.number(layers.index(index)) if index in layers else ""
        row = f"  {layout.label(site):<12} {site.order:>3} {key:>4} {site.channels:>8}  {role:<12}"
        for patch in patches or ():
            weight = patch.weights[index]
            cell = "-" if weight.weight == 0 else f"{weight.weight:.3g}" + (" neg." if weight.flipped else "")
            row += f" {cell:>9}"
        lines.append(row.rstrip())
    lines += [line for number, patch in enumerate(patches or (), 1) for line in _memory(adapter, patch, number)]
    if patches is not None and not patches:
        lines.append("  (no image prompt is applied to this model)")
    return "\n".join(lines)


def _memory(adapter: AdapterWeights, patch: AdapterPatch, number: int) -> Iterator[str]:
    """What a prompt holds on the device while the model samples, and what of the adapter has to be there with it."""
    if patch.held is None:
        return
    reach = patch.reach
    which = "tokens of two timesteps" if reach.block_by_block else "keys and values" + " of two timesteps" * reach.timed
    yield f"  prompt {number} holds {_size(patch.held.bytes)} of {which}"
    if reach.resident and patch.name == adapter.name:
        weights = sum(p.numel() * p.element_size() for p in adapter.module.parameters())
        yield f"    and {adapter.name}, {_size(weights)}, is used at every step: it stays with the model as far as there is room"


def _size(count: float) -> str:
    """Bytes for people: ``89.7 MB``."""
    unit = next((unit for unit, most in (("kB", 1e6), ("MB", 1e9)) if count < most), "GB")
    return f"{count / {'kB': 1e3, 'MB': 1e6, 'GB': 1e9}[unit]:.3g} {unit}"
