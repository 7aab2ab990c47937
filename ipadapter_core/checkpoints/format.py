"""What a family declares (``Format``), what is read from a file (``AdapterSpec``), what is built (``AdapterWeights``)."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..compatibility import Rules
from ..errors import CorruptFileError, IncompatibleEncoderError, InvalidInputError, one_line
from ..features import Encoded, Feature, Framing, find_encoder
from ..files.state_dict import StateDict, TensorFile
from ..models.reach import Reach
from ..models.unet import SDXL, unet_of_size
from .containers import numbers_every_layer
from .keys import UNET, Keys
from .projectors import TORCH, Operations

TrainedUnconditional = Literal["zero_embeds", "zero_pixels", "black_picture", "same", "off"]
"""What stood for no image in an adapter's training: zeros for its feature, or an encoded picture of zeros, or a black one.

``same``: the negative branch sees the image too. ``off``: it sees nothing at all, as if there were no adapter.
"""

LAYER_KEY = re.compile(r"ip_adapter\.(0|[1-9][0-9]{0,4})\.to_[kv]_ip\.weight")
"""Keys and values of an attention, without anything else."""

MOST_LAYERS = 1000
"""Cross-attentions of a model, and layers of a resampler; SDXL has 70. Each becomes modules, whatever its size."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Facts about an adapter, all read from keys and shapes.

    ``num_tokens`` counts the image tokens of one reference; 0 if it depends on the encoder and the encoder is not known.
    ``layer_channels`` holds the rows of the i-th ``to_k_ip``, in checkpoint order (UNets: down, up, mid); ``token_dim`` its
    columns, which is also the width of the image tokens unless ``projected_by_model``.
    ``encoder`` is the name in ``features.ENCODERS`` that the feature's width points to, or "custom"; of several, both with " + ".
    ``options`` holds the sizes only this family's projector has (``depth``, ``queries``, ``hidden_dim``, …).
    """

    format: Format
    base_model: str
    num_tokens: int
    token_dim: int
    feature_dim: int
    unconditional: TrainedUnconditional
    encoder: str
    layer_channels: tuple[int, ...]
    options: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    left_out: Mapping[str, int] = field(default_factory=dict[str, int], hash=False, compare=False)
    """Groups of the file that are not part of an adapter and stay unused, with their numbers of tensors."""
    lora_layers: int = field(default=0, compare=False)
    """How many layers of the base model a LoRA inside the file changes."""

    @property
    def family(self) -> str:
        """The name of the family."""
        return self.format.name

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of all image encoders that it needs, in the order in which its feature packs them."""
        return tuple(look.encoder for look in self.format.feature.looks) or (self.encoder,)

    @property
    def feature(self) -> str:
        """The kind of feature that the adapter reads."""
        return self.format.feature.kind

    @property
    def projected_by_model(self) -> bool:
        """Whether the image tokens must pass a projection of the base model before the layers can take them (Kolors)."""
        return "text_dim" in self.options

    @property
    def face_model(self) -> str:
        """The pack of the face model that its training read: antelopev2 for Kolors, else buffalo_l."""
        return "antelopev2" if self.base_model == "Kolors" else "buffalo_l"

    @property
    def face_side(self) -> int:
        """Side in pixels of the aligned face that its training looked at: 224 for SD1.5, 256 for SDXL, 336 for Kolors."""
        if self.base_model == "Kolors":
            return 336
        return 256 if self.token_dim == SDXL.text_width else 224


@dataclass(frozen=True, slots=True)
class EncoderSizes:
    """What is told of an image encoder by its config: widths of its two features, number of tokens, side in pixels (0: unsaid)."""

    projection_dim: int
    hidden_size: int
    tokens: int
    image_size: int = 0


class FreshSizes(Protocol):
    """What a training may ask of a new projector; 0: as the released files have it."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def hidden_dim(self) -> int: ...


class Format(ABC):
    """One family of adapter files: all that is true of it and of no other. One instance each, in ``FORMATS``.

    A file (normalised by ``containers.normalise``) is claimed when the projector's key ``anchor`` is there, the rest of
    every key of the projector matches ``allowed``, every other key matches ``layer_keys``, and ``marks`` finds the family in
    it. Of several families with the same keys, one that names the others in ``before`` is asked before them.
    """

    name: ClassVar[str]
    """In configs, in the metadata of files, and in messages."""
    label: ClassVar[str]
    """For people, where there is room for a few words."""
    feature: ClassVar[Feature]
    unconditional: ClassVar[TrainedUnconditional]
    framing: ClassVar[Framing] = "center"
    """How its training saw pictures that were not square, where the user chooses nothing else."""
    anchor: ClassVar[str]
    allowed: ClassVar[re.Pattern[str]]
    layer_keys: ClassVar[re.Pattern[str]] = LAYER_KEY
    lora_keys: ClassVar[re.Pattern[str] | None] = None
    """The keys of a LoRA that its files may carry."""
    keys: ClassVar[Keys] = UNET
    """How its files name what is in an ``AdapterModule``."""
    before: ClassVar[tuple[str, ...]] = ()
    reach: ClassVar[Reach] = Reach()
    """Which attentions of a base model its layers serve."""
    encoder: ClassVar[str | None] = None
    """The encoder of all its files, where the feature's width does not tell it."""
    strength: ClassVar[float] = 1.0
    """What people begin with."""
    trained_on: ClassVar[frozenset[str]] = frozenset()
    """Families of base models that its files were trained for, where they fit others by their shapes too."""
    released: ClassVar[tuple[str, ...]] = ()
    """Files of it that people have, and where from."""
    serves: ClassVar[tuple[tuple[str, int], ...]] = ()
    """What its files are good for, in the words of ``wishes.WISHES``, and how well: the highest number is taken first."""
    public: ClassVar[tuple[str, str] | None] = None
    """A file of it to download: the name of the base model that it is for, and its name in DOWNLOADS."""
    advice: ClassVar[str] = ""
    """Strengths and settings that people use, in a sentence or two; nothing for those that everybody knows."""
    trains: ClassVar[bool] = False
    """Whether new adapters of it are trained, see ``fresh``."""
    summary: ClassVar[str] = ""
    """What a new one has, in a few words, for those who choose among the families that are trained."""

    @abstractmethod
    def parse(self, file: TensorFile) -> AdapterSpec:
        """The sizes of a file's adapter. Raises CorruptFileError where one of its tensors is missing or strange."""

    @abstractmethod
    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        """The network from features to image tokens, empty."""

    def layers(self, spec: AdapterSpec, operations: Operations) -> Mapping[str, nn.Module]:
        """The lists of what every layer has, empty: ``to_k_ip``, ``to_v_ip`` and norms and gates, by their names in ``keys``."""
        return linear_layers(spec, operations, bias=False)

    def key_value(
        self, module: AdapterModule, index: int, tokens: Tensor, timestep: float | None
    ) -> tuple[Tensor, Tensor]:
        """K and V ``b n c`` of the i-th layer, normed as the family does; ``timestep`` 0..1000 where its reach is timed, else None."""
        return module.to_k_ip[index](tokens), module.to_v_ip[index](tokens)

    def query_weight(self, module: AdapterModule, index: int) -> Tensor | None:
        """Weight ``d`` of the i-th layer's RMS norm of queries, of a family whose reach wants raw ones; None: a norm without."""
        return None

    def self_weight(self, module: AdapterModule, index: int) -> Tensor | None:
        """Weight ``d`` of the i-th layer's RMS norm of the picture's own keys (``Reach.own_keys``); None: a norm without."""
        return None

    def gate(self, module: AdapterModule, index: int) -> Callable[[Tensor], Tensor] | None:
        """What makes the factors ``b t c`` of the i-th layer's result from a block's conditioning ``b t e`` (``Reach.gated``)."""
        return None

    def tokens_at(self, projector: nn.Module, constant: Tensor, timestep: float) -> Tensor:
        """Image tokens ``i n d`` at a timestep 0..1000, of a family whose reach is timed.

        ``constant`` is what ``tokens`` gave: all that does not depend on the timestep. Asked once per timestep for all sites.
        """
        return constant

    def tokens(self, projector: nn.Module, features: Tensor, face_scale: float) -> Tensor:
        """Image tokens ``i n d`` of features ``i ...``; ``face_scale`` as in AdapterWeights.tokens()."""
        return projector(features)

    def check_lora(self, lora: StateDict, spec: AdapterSpec) -> None:
        """Raise CorruptFileError unless the LoRA inside a file fits its layers; there is none without ``lora_keys``."""
        assert not lora, f"{self.name} does not say how its LoRA must be"

    def loadable_lora(self, lora: StateDict, spec: AdapterSpec) -> dict[str, Tensor]:
        """The LoRA inside a file under keys that LoRA loaders know; asked where there are ``lora_keys``."""
        return dict(lora)

    def is_cross_attention(self, key: str) -> bool:
        """Whether a key of ``loadable_lora`` is of an attention to the text."""
        return "attn2" in key

    def base_model(self, token_dim: int, channels: tuple[int, ...]) -> str:
        """The base model that has so many sites, and text tokens or channels of these widths; ``custom …`` if none is known."""
        return base_model(token_dim, len(channels))

    def fresh(self, token_dim: int, encoder: EncoderSizes, sizes: FreshSizes) -> tuple[nn.Module, int]:
        """A projector of random weights to train, in the shapes of the released files, and its number of image tokens.

        Asked of families that say so in ``trains``.
        """
        raise NotImplementedError

    def as_version(self, spec: AdapterSpec, version: int) -> AdapterSpec:
        """The spec read as another version of the family; the same where there are none."""
        return spec

    def under(self, rules: Rules) -> Format:
        """The family as these rules read it, for families of which another pack has another formula."""
        return self

    def metadata(self, spec: AdapterSpec) -> dict[str, str]:
        """What a saved file says of itself beyond what every family's does."""
        return {}

    def marks(self, file: TensorFile) -> bool:
        """Whether a file with the family's keys is of it, where keys alone do not tell."""
        return True

    def variant(self, file: TensorFile) -> str | None:
        """What a file has beyond the family's published ones, in words, where its authors' code reads more than they published."""
        return None

    def detect(self, file: TensorFile) -> bool:
        return self.resembles(file.tensors) and not self.foreign_keys(file.tensors) and self.may_be(file)

    def may_be(self, file: TensorFile) -> bool:
        """Whether nothing but strange or missing keys speaks against a file's being of this family.

        UNets' and transformers' adapters have the same projectors and number their layers otherwise.
        """
        every = numbers_every_layer(file.tensors) == (self.keys.step == 1) or not self.keys.in_common_group
        return every and self.marks(file)

    def resembles(self, state: StateDict) -> bool:
        """Whether the key that marks this family is there, whatever else may be."""
        return self.keys.projector + self.anchor in state

    def foreign_keys(self, state: StateDict) -> list[str]:
        """The keys that no file of this family has."""
        return sorted(key for key in state if not self.allows(key))

    def allows(self, key: str) -> bool:
        if self.layer_keys.fullmatch(key) is not None:
            return True
        prefix = self.keys.projector
        return key.startswith(prefix) and self.allowed.fullmatch(key.removeprefix(prefix)) is not None

    def likeness(self, state: StateDict) -> tuple[int, int]:
        """How many keys of a file are as this family's projector has them, and how many begin so."""
        found = self.keys.of_projector(state)
        return sum(self.allowed.fullmatch(key) is not None for key in found), len(found)

    def spec(
        self,
        state: StateDict,
        width: str,
        *,
        num_tokens: int,
        feature_dim: int,
        token_dim: int | None = None,
        options: Mapping[str, int] | None = None,
    ) -> AdapterSpec:
        """The spec of a file whose tokens are as wide as the tensor ``width`` is long, or else ``token_dim``."""
        token_dim = int(state[width].shape[0]) if token_dim is None else token_dim
        channels = layer_channels(state, self.keys, token_dim, width)
        return AdapterSpec(
            self,
            self.base_model(token_dim, channels),
            num_tokens,
            token_dim,
            feature_dim,
            self.unconditional,
            self.encoder or self._encoder_name(feature_dim),
            channels,
            options or {},
        )

    def _encoder_name(self, feature_dim: int) -> str:
        if self.feature.looks:
            return " + ".join(look.encoder for look in self.feature.looks)
        encoded = self.feature.encoded
        return "custom" if encoded is None else encoder_name(encoded, feature_dim)

    def __repr__(self) -> str:
        return f"<format {self.name}>"

    def __deepcopy__(self, memo: object) -> Format:
        return self


class Bare:
    """torch.nn's layers that never fill themselves with random numbers: their weights come from a file."""

    class Linear(nn.Linear):
        def reset_parameters(self) -> None: ...

    class LayerNorm(nn.LayerNorm):
        def reset_parameters(self) -> None: ...


BARE: Operations = Bare


class AdapterModule(nn.Module):
    """An adapter's network: ``projector``, and ``to_k_ip[i]``, ``to_v_ip[i]`` and what else ``Format.layers`` has of the i-th layer."""

    projector: nn.Module
    to_k_ip: nn.ModuleList
    to_v_ip: nn.ModuleList

    def __init__(self, spec: AdapterSpec, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.casts_weights = operations is not TORCH and operations is not BARE
        """Whether the layers bring their weights to the input's device and dtype themselves (comfy.ops.manual_cast)."""
        self.computes_on: torch.device | None = None
        """Where such layers compute while their weights, or some of them, are elsewhere; None: where the weights are."""
        self.keys = spec.format.keys
        self.projector = spec.format.projector(spec, operations)
        for name, layers in spec.format.layers(spec, operations).items():
            self.add_module(name, layers)

    def layer(self, name: str, index: int) -> nn.Module:
        """What a list that ``Format.layers`` names has of the i-th layer."""
        return self.get_submodule(f"{name}.{index}")

    def checkpoint_state(self) -> dict[str, Tensor]:
        """The weights under the keys of a flat released file (``image_proj.…``, ``ip_adapter.1.to_k_ip.weight``)."""
        return {self.keys.in_file(key): tensor.detach() for key, tensor in self.state_dict().items()}


def linear_layers(spec: AdapterSpec, operations: Operations, *, bias: bool) -> dict[str, nn.Module]:
    """One matrix for the keys and one for the values of every layer, empty."""
    return {
        name: nn.ModuleList(operations.Linear(spec.token_dim, c, bias=bias) for c in spec.layer_channels)
        for name in ("to_k_ip", "to_v_ip")
    }


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A loaded adapter: its spec, its layers, and where it came from."""

    spec: AdapterSpec
    module: AdapterModule
    name: str = "adapter"
    metadata: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    lora: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], hash=False)
    """The LoRA inside the file under its own keys; loadable_lora() names it for loaders."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.module.to_k_ip.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where it computes, so where what it reads belongs."""
        return self.module.computes_on or next(self.module.to_k_ip.parameters()).device

    def tokens(self, features: Tensor, face_scale: float = 1.0) -> Tensor:
        """Image tokens ``b n d`` of features: ``b e`` image embeds or ``b t e`` penultimate states, see ``spec.feature``.

        ``face_scale`` is how much FaceID Plus v2 reads in the picture beside the face embedding.

        With layers of torch.nn the features are brought to the weights' device and dtype; layers that cast their own
        weights get them as they are. Raises IncompatibleEncoderError when the features have another rank or width.
        """
        spec = self.spec
        feature = spec.format.feature
        if features.ndim != feature.rank or features.shape[-1] != spec.feature_dim:
            expected = ", ".join(map(str, feature.shape(spec.feature_dim, "batch")))
            raise IncompatibleEncoderError(
                f"{self.name} ({spec.family}, {spec.base_model}) needs {spec.feature} of shape [{expected}] from the "
                f"{spec.encoder} image encoder and got {list(features.shape)}: choose that encoder."
            )
        return spec.format.tokens(self.module.projector, self._fitting(features), face_scale)

    def key_value(self, index: int, tokens: Tensor, timestep: float | None = None) -> tuple[Tensor, Tensor]:
        """Image keys and values ``b n c`` of the layer at ``index`` in the order of the file."""
        return self.spec.format.key_value(self.module, index, self._fitting(tokens), timestep)

    def gate(self, index: int) -> Callable[[Tensor], Tensor] | None:
        """What makes factors ``b t c`` of the layer's result from a block's conditioning ``b t e``; None where there is no gate."""
        gate = self.spec.format.gate(self.module, index)
        if gate is None:
            return None
        # the conditioning is small and read in every call: it comes to the weights' dtype, also where weights would come to its
        dtype = self.dtype if self.dtype.itemsize > 1 else None
        return lambda emb: gate(self._fitting(emb if dtype is None else emb.to(dtype)))

    def tokens_at(self, constant: Tensor, timestep: float) -> Tensor:
        """Image tokens ``b n d`` at a timestep 0..1000 of what ``tokens`` gave, of a family whose reach is timed."""
        return self.spec.format.tokens_at(self.module.projector, self._fitting(constant), timestep)

    def loadable_lora(self, *, cross_attention: bool = False) -> dict[str, Tensor]:
        """The LoRA inside the file under keys that LoRA loaders know, or that part of it which acts on the attention to the text.

        Raises CorruptFileError where no name is known for one of its layers.
        """
        format = self.spec.format
        named = format.loadable_lora(self.lora, self.spec)
        return {key: t for key, t in named.items() if not cross_attention or format.is_cross_attention(key)}

    def _fitting(self, x: Tensor) -> Tensor:
        if self.module.casts_weights:
            return x
        if self.dtype.itemsize == 1:
            raise InvalidInputError(
                f"{self.name} is in {self.dtype}, which computes nothing: load it with dtype=torch.float16"
            )
        return x.to(next(self.module.to_k_ip.parameters()))


def empty_module(spec: AdapterSpec, operations: Operations) -> AdapterModule:
    """The layers of ``spec`` on the meta device: shapes, no memory."""
    with torch.device("meta"):
        return AdapterModule(spec, operations=operations)


def shape_of(state: StateDict, key: str, *, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that the family cannot do without.

    Raises CorruptFileError when it is missing, has another rank or an axis of length 0.
    """
    if key not in state:
        raise CorruptFileError(f"the tensor '{key}' is missing: the file is incomplete; download or export it again.")
    shape = tuple(state[key].shape)
    if len(shape) != rank or 0 in shape:
        raise CorruptFileError(f"'{key}' has shape {list(shape)}, {rank} non-empty axes were expected; it is damaged.")
    return shape


def tokens_in(state: StateDict, rows: str, width: str) -> int:
    """How many tokens as wide as the tensor ``width`` is long one with so many ``rows`` makes.

    Raises CorruptFileError when it is not a whole number above 0.
    """
    total, _ = shape_of(state, rows, rank=2)
    (unit,) = shape_of(state, width, rank=1)
    if total % unit or total < unit:
        raise CorruptFileError(
            f"'{rows}' has {total} rows, a multiple of {unit} was expected (the length of '{width}'): the file is damaged."
        )
    return total // unit


def parse_vector(of: Format, file: TensorFile) -> AdapterSpec:
    """The spec of a file whose image_proj makes tokens of one vector: two layers (``proj.0``, ``proj.2``) and a norm of each token."""
    hidden_dim, feature_dim = shape_of(file.tensors, "image_proj.proj.0.weight", rank=2)
    norm = "image_proj.norm.weight"
    num_tokens = tokens_in(file.tensors, "image_proj.proj.2.weight", norm)
    return of.spec(
        file.tensors, norm, num_tokens=num_tokens, feature_dim=feature_dim, options={"hidden_dim": hidden_dim}
    )


def resampler_depth(state: StateDict, group: str, name: str = "layers") -> int:
    """Number of layers called ``name`` under ``group``, ``image_proj.`` or deeper. Raises CorruptFileError when one is missing."""
    pattern = re.compile(rf"{re.escape(group + name)}\.(0|[1-9][0-9]{{0,3}})\..*")
    numbers = sorted({int(match[1]) for match in filter(None, map(pattern.fullmatch, state))})
    if len(numbers) > MOST_LAYERS:
        raise CorruptFileError(f"{group}{name} holds {len(numbers)} layers; no adapter has over {MOST_LAYERS}.")
    if numbers != list(range(len(numbers))):
        gap = next(i for i, n in enumerate(numbers) if i != n)
        raise CorruptFileError(
            f"{group}{name} jumps from {gap - 1} to {numbers[gap]}: {group}{name}.{gap} is missing. "
            "The file is incomplete; download or export it again."
        )
    return len(numbers)


def layer_channels(state: StateDict, keys: Keys, token_dim: int, width: str) -> tuple[int, ...]:
    """Rows of the i-th ``to_k_ip``, as ``keys`` number them.

    Raises CorruptFileError when a key or a value layer is missing, a number is left out or a foreign one is there, or
    a layer does not take tokens of ``token_dim``, which the tensor ``width`` tells.
    """
    found = {name: keys.numbers(state, name) for name in ("to_k_ip", "to_v_ip")}
    most = max(map(len, found.values()))
    if most > MOST_LAYERS:
        raise CorruptFileError(f"it holds {most} layers of keys or values; no base model has over {MOST_LAYERS}.")
    expected = {keys.number(index) for index in range(most)}
    missing = [keys.layer(name, number) for name in found for number in sorted(expected - found[name])]
    if missing or not expected:
        extra = sorted(set[int]().union(*found.values()) - expected)
        also = f" and there are unexpected numbers {few(map(str, extra))}" if extra else ""
        raise CorruptFileError(
            f"it holds {len(found['to_k_ip'])} key and {len(found['to_v_ip'])} value layers, but the numbers must run "
            f"{keys.sequence()} without a gap: missing {few(missing) or keys.layer('to_k_ip', keys.first)}{also}. "
            "The file is incomplete; download or export it again."
        )
    channels: list[int] = []
    for number in sorted(expected):
        key_name = keys.layer("to_k_ip", number)
        rows, columns = shape_of(state, key_name, rank=2)
        if columns != token_dim:
            raise CorruptFileError(
                f"'{key_name}' takes tokens of {columns} channels, but its tokens have {token_dim} "
                f"('{width}'): the parts come from different adapters, or one of these is damaged."
            )
        channels.append(rows)
    return tuple(channels)


def base_model(token_dim: int, layers: int) -> str:
    """The base model that has this width of text tokens and this number of cross-attentions."""
    unet = unet_of_size(token_dim, layers)
    return f"custom {token_dim}" if unet is None else unet.name


def encoder_name(encoded: Encoded, width: int) -> str:
    """The name in ``features.ENCODERS`` that features of this width point to, or "custom"."""
    encoder = find_encoder(encoded, width)
    return "custom" if encoder is None else encoder.name


def check_tensors(module: AdapterModule, state: StateDict) -> dict[str, Tensor]:
    """The checkpoint's tensors under the module's keys, checked to be exactly the module's.

    Raises CorruptFileError naming the first missing, unexpected, misshapen or non-float tensors.
    """
    inside = {module.keys.in_file(key): key for key in module.state_dict()}
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    expected = {key: shapes[own] for key, own in inside.items()}
    missing = [key for key in expected if key not in state]
    if missing:
        raise CorruptFileError(
            f"of its {len(expected)} tensors these are missing: {few(missing)}. "
            "The file is incomplete; download or export it again."
        )
    unexpected = sorted(key for key in state if key not in expected)
    if unexpected:
        raise CorruptFileError(
            f"tensors without a place in this family: {few(unexpected)}; export it again without them."
        )
    misshapen = [
        f"{key} is {list(state[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if tuple(state[key].shape) != shape
    ]
    if misshapen:
        raise CorruptFileError(
            f"tensors that do not fit the rest: {few(misshapen)}{_said_by(state, expected)}. The file is damaged."
        )
    stored = [f"{key} is {state[key].dtype}" for key in expected if not state[key].is_floating_point()]
    if stored:
        raise CorruptFileError(f"weights must be floating point: {few(stored)}. Use a float16 or float32 file.")
    return {own: state[key] for key, own in inside.items()}


def _said_by(state: StateDict, expected: Mapping[str, tuple[int, ...]]) -> str:
    """The tensors that alone have the sizes which others should have: one strange tensor against many is the damaged one."""
    shapes = {key: tuple(state[key].shape) for key in expected}
    wrong = [key for key in expected if shapes[key] != expected[key]]
    sizes = {
        size
        for key in wrong
        for size, found in zip_longest(expected[key], shapes[key])
        if size is not None and size != found
    }
    sources = [key for key in expected if shapes[key] == expected[key] and sizes & {*shapes[key]}]
    if not 0 < len(sources) <= len(wrong):
        return ""
    return ", as " + few(f"{key} {list(shapes[key])} says" for key in sources)


def check_finite(tensors: StateDict) -> None:
    """Raise CorruptFileError naming the first tensors, by their keys in the file, that hold NaN or infinity; no copy."""
    bad = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        raise CorruptFileError(
            f"NaN or infinite numbers in {few(bad)}. The training diverged or the file was "
            "damaged when it was converted; use another file."
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.numel() == 0:
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:  # float8 has no aminmax
        tensor = tensor.float()
    # Both ends are NaN if any number is, and one is infinite if any is: 10 times faster than isfinite().all() on a CPU.
    ends: Any = torch.aminmax(tensor)
    return bool(torch.isfinite(ends.min) & torch.isfinite(ends.max))


def few(names: Iterable[str], limit: int = 4) -> str:
    """The first few of many names, for a message."""
    listed = list(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(map(one_line, listed[:limit])) + rest
