"""Files that PEFT wrote, against the weights that PEFT itself merges: every method, option and pattern that is read."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.errors import CorruptFileError, UnknownFormatError
from ipadapter_core.lora import Layer, MatchedLoRA, load_lora, match_lora, targets_of
from ipadapter_core.lora.algorithms.input_butterfly import InputButterfly, butterfly_order
from ipadapter_core.lora.name_patterns import NamePatterns, full_match
from ipadapter_core.lora.peft_config import METHODS


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(12, 8)
        self.to_k = nn.Linear(12, 8, bias=False)
        self.ff = nn.Linear(8, 12)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 4, 1)
        self.norm = nn.LayerNorm(8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x


ALL = ["to_q", "to_k", "ff", "conv", "point"]


def saved(folder: Path, config: PeftConfig, seed: int = 1) -> tuple[Net, dict[str, Tensor]]:
    """A plain model, and its weights after PEFT merged an adapter of random numbers, which lies in the folder."""
    plain = Net()
    model = PeftModel(Net(), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 4
    model.save_pretrained(str(folder))
    merged = model.merge_and_unload()
    return plain, {key: t.detach() for key, t in merged.state_dict().items()}


def placed(file: Path, model: nn.Module) -> MatchedLoRA:
    found = match_lora(load_lora(file), {"denoiser": targets_of(model)})
    assert not found.left_out
    return found


def changed(model: nn.Module, found: MatchedLoRA) -> dict[str, Tensor]:
    weights = {key: t.detach().clone() for key, t in model.state_dict().items()}
    for match in found.matches:
        pristine = model.state_dict()[match.key].detach().clone()
        match.change(pristine, weights[match.key], 1.0)
    return weights


def live_is_merged(model: nn.Module, found: MatchedLoRA, merged: Mapping[str, Tensor]) -> None:
    """The side path of every layer gives what the merged layer gives."""
    for path in {p.target.path for p in found.matches}:
        module = model.get_submodule(path)
        shape = (2, module.weight.shape[1], 6, 5) if isinstance(module, nn.Conv2d) else (2, 5, module.weight.shape[-1])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        y = module(x)
        out = y
        for p in found.matches:
            if p.target.path == path:
                make = p.update.unfused if p.parameter == "weight" else p.update.unfused_bias
                out = out + make(Layer(module), y)(x, y, 1.0)
        other = copy.deepcopy(module)
        for name, parameter in other.named_parameters():
            parameter.data = merged[f"{path}.{name}"]
        assert_close(out, other(x), rtol=1e-4, atol=1e-4)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=ALL),
    "rsLoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=ALL),
    "DoRA": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=ALL),
    "LoRA with bias": lambda: peft.LoraConfig(r=2, lora_alpha=8, lora_bias=True, target_modules=["to_q", "ff"]),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=ALL,
        alpha_pattern={r".*0\.to_q": 4, "^blocks.1.*": 2, "conv": 7},
        rank_pattern={r"blocks\.\d+\.(to_q|to_k)": 2, "point": 1},
    ),
    "all biases": lambda: peft.LoraConfig(r=2, lora_alpha=2, bias="all", target_modules=["to_q", "to_k"]),
    "biases of LoRA layers": lambda: peft.LoraConfig(
        r=2, lora_alpha=2, bias="lora_only", target_modules=["to_q", "ff"]
    ),
    "modules to save": lambda: peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["to_q"], modules_to_save=["last", "norm"]
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=100, target_modules=["to_q", "ff"]
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=ALL),
    "LoHa with cores": lambda: peft.LoHaConfig(r=3, alpha=2, use_effective_conv2d=True, target_modules=ALL),
    "LoHa patterns": lambda: peft.LoHaConfig(
        r=4, alpha=8, target_modules=ALL, alpha_pattern={"blocks.0.*": 1}, rank_pattern={"ff": 2}
    ),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=ALL),
    "LoKr both low-rank": lambda: peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=ALL
    ),
    "LoKr whole": lambda: peft.LoKrConfig(r=512, alpha=64, target_modules=ALL),
    "LoKr with a core": lambda: peft.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, target_modules=ALL),
    "LoKr patterns": lambda: peft.LoKrConfig(r=512, alpha=64, target_modules=ALL, rank_pattern={r".*\.to_q": 128}),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=ALL),
    "OFT by its series": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=ALL),
    "OFT of 3 terms": lambda: peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=3, target_modules=ALL),
    "OFT of 7 terms": lambda: peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=7, target_modules=ALL),
    "OFT shared": lambda: peft.OFTConfig(
        r=0, oft_block_size=2, block_share=True, use_cayley_neumann=False, target_modules=ALL
    ),
    "COFT": lambda: peft.OFTConfig(
        r=2, oft_block_size=0, coft=True, eps=0.3, use_cayley_neumann=False, target_modules=ALL
    ),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
    "IA3": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=["ff", "conv"]),
    "IA3 by an expression": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=r".*\.(ff|point)"),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=ALL),
    "HRA orthogonal": lambda: peft.HRAConfig(r=3, apply_GS=True, target_modules=ALL),
}

PEFT = tuple(int(n) for n in re.findall(r"\d+", peft.__version__)[:2])
RECENT = PEFT >= (0, 18)
"""Older ones write another OFT, which they and we refuse from then on, and have no options that some cases need."""
SINCE_LONG = ("LoRA", "rsLoRA", "DoRA", "LoHa", "LoKr", "IA3", "BOFT", "HRA")
CASES = tuple(CONFIGS) if RECENT else SINCE_LONG
if PEFT < (0, 19):  # these leave the trained biases out of the file
    CASES = tuple(name for name in CASES if name != "biases of LoRA layers")


@pytest.mark.parametrize("name", CASES)
def test_the_change_is_peft_s(name: str, tmp_path: Path) -> None:
    plain, merged = saved(tmp_path, CONFIGS[name]())
    found = placed(tmp_path / "adapter_model.safetensors", plain)
    weights = changed(plain, found)
    moved = [key for key, t in weights.items() if not torch.equal(t, plain.state_dict()[key])]
    assert len(moved) >= 2
    for key, expected in merged.items():
        assert_close(weights[key], expected, rtol=1e-4, atol=2e-5)
    live_is_merged(plain, found, merged)


def test_embeddings(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.token_embedding = nn.Embedding(10, 6)

    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["token_embedding"])
    model = PeftModel(Words(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3
    model.save_pretrained(str(tmp_path))
    plain = Words()
    found = placed(tmp_path / "adapter_model.safetensors", plain)
    merged = model.merge_and_unload().state_dict()
    assert_close(changed(plain, found)["token_embedding.weight"], merged["token_embedding.weight"])
    ids = torch.tensor([[1, 9, 3]])
    y = plain.token_embedding(ids)
    (match,) = found.matches
    live = y + match.update.unfused(Layer(plain.token_embedding), y)(ids, y, 1.0)
    assert_close(live, nn.functional.embedding(ids, merged["token_embedding.weight"]))


def test_butterflies_of_several_stages() -> None:
    """PEFT makes them on a GPU only; its own order of the inputs, and its formula with whole matrices."""
    layer = peft.tuners.boft.layer.Linear.__new__(peft.tuners.boft.layer.Linear)
    for count, size, stages in ((4, 4, 2), (4, 2, 3), (8, 4, 3)):
        for stage in range(stages):
            order = layer.block_butterfly_perm(count * size, count // 2**stage, size // 2, stages - 1)
            assert torch.equal(butterfly_order(count, size, stage, stages), order)
        blocks = torch.randn(stages, count, size, size, generator=torch.Generator().manual_seed(stages)) / 3
        factors = torch.randn(6, generator=torch.Generator().manual_seed(9))
        turns = [layer.cayley_batch(part) for part in blocks]
        whole = torch.eye(count * size)
        for stage, turn in enumerate(turns):
            mixed = torch.eye(count * size)[butterfly_order(count, size, stage, stages)]
            whole = mixed @ torch.block_diag(*turn) @ mixed.T @ whole
        weight = torch.randn(6, count * size, generator=torch.Generator().manual_seed(5))
        update = InputButterfly(blocks, factors)
        assert_close(weight + update.delta(weight), (whole @ weight.T).T * factors[:, None], rtol=1e-4, atol=1e-4)
        linear = nn.Linear(count * size, 6, bias=False)
        linear.weight.data = weight
        x = torch.randn(3, count * size, generator=torch.Generator().manual_seed(6))
        live = linear(x) + update.unfused(Layer(linear), linear(x))(x, linear(x), 1.0)
        assert_close(live, x @ (weight + update.delta(weight)).T, rtol=1e-4, atol=1e-4)


# --- which file a config belongs to ----------------------------------------------------------------------------------


def scale_in(file: Path) -> float:
    (scale,) = {m.weight.scale for m in load_lora(file).modules}  # type: ignore[union-attr]
    return scale


def test_a_renamed_file_keeps_its_config(tmp_path: Path) -> None:
    saved(tmp_path, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"]))
    renamed = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "my style.safetensors")
    assert scale_in(renamed) == 4.0
    assert {m.alpha_from for m in load_lora(renamed).modules} == {"adapter_config.json"}
    other = {key: torch.randn(t.shape) for key, t in load_file(renamed).items()}
    save_file(other, tmp_path / "other.safetensors")
    assert scale_in(renamed) == 4.0, "the ranks agree"
    assert any("though the folder has 2 files" in note for note in load_lora(renamed).notes)
    save_file(
        {k: (t[:2] if "lora_A" in k else t[:, :2]).contiguous() for k, t in other.items()},
        tmp_path / "third.safetensors",
    )
    third = load_lora(tmp_path / "third.safetensors")
    assert {m.alpha_from for m in third.modules} == {"default"}
    assert any("belongs to another file" in note for note in third.notes)


@pytest.mark.parametrize("encode", ["utf-8-sig", "utf-16"])
def test_configs_of_windows(tmp_path: Path, encode: str) -> None:
    saved(tmp_path, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"]))
    config = tmp_path / "adapter_config.json"
    config.write_bytes(config.read_text().encode(encode))
    assert scale_in(tmp_path / "adapter_model.safetensors") == 4.0


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"r": ' + "9" * 5000 + "}", ""])
def test_damaged_configs_are_one_sentence(tmp_path: Path, text: str) -> None:
    saved(tmp_path, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"]))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CorruptFileError, match=r"adapter_config\.json"):
        load_lora(tmp_path / "adapter_model.safetensors")


# --- what is refused by name -----------------------------------------------------------------------------------------


def rewritten(folder: Path, **options: Any) -> Path:
    saved(folder, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"]))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "VERA"}, "PEFT 'VERA' file"),
        ({"peft_type": "SOMETHING NEW"}, "PEFT 'SOMETHING NEW' file"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "taken out"),
        ({"init_lora_weights": "corda"}, "taken out"),
        ({"init_lora_weights": "loftq"}, "taken out"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"target_parameters": ["x"]}, "target parameters"),
        ({"layer_replication": [[0, 1]]}, "layer replication"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"peft_type": "OFT"}, "before 0.14"),
    ],
)
def test_what_cannot_be_applied_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownFormatError, match=message):
        load_lora(rewritten(tmp_path, **options))


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "eva"}, {"init_lora_weights": "gaussian"}, {"new option": [1]}]
)
def test_what_changes_nothing_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    assert scale_in(rewritten(tmp_path, **options)) == 4.0


@pytest.mark.parametrize(("part", "method"), METHODS)
def test_other_methods_are_named_by_their_tensors(part: str, method: str) -> None:
    with pytest.raises(UnknownFormatError, match=f"is a PEFT {re.escape(method)} file"):
        load_lora({f"base_model.model.blocks.0.to_q{part}x": torch.zeros(2, 2)})


METHODS_OF_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "VeRA": ("VeraConfig", {"r": 2}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 4}),
    "RandLoRA": ("RandLoraConfig", {"r": 2}),
    "SHiRA": ("ShiraConfig", {"r": 1}),
    "MiSS": ("MissConfig", {"r": 2}),
    "C3A": ("C3AConfig", {"block_size": 4}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 4, "num_vectors": 4, "vector_length": 4, "topk": 2}),
    "DeLoRA": ("DeloraConfig", {"r": 2}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 4}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["norm"]}),
}


@pytest.mark.parametrize("method", [m for m, (name, _) in METHODS_OF_PEFT.items() if hasattr(peft, name)])
@pytest.mark.parametrize("with_config", [True, False])
def test_files_of_other_methods(tmp_path: Path, method: str, with_config: bool) -> None:
    name, options = METHODS_OF_PEFT[method]
    PeftModel(Net(), getattr(peft, name)(**{"target_modules": ["to_q"]} | options)).save_pretrained(str(tmp_path))
    if not with_config:
        (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UnknownFormatError, match=r"is a PEFT .* file; of PEFT's methods LoRA, AdaLoRA"):
        load_lora(tmp_path / "adapter_model.safetensors")


# --- patterns --------------------------------------------------------------------------------------------------------

NAMES = (
    "down_blocks.0.attn1.to_q",
    "down_blocks.10.attn2.to_k",
    "x",
    "a_b.c",
    "to_q",
    "unet.mid.to_out.0",
    "0",
    "a.b.b",
)
PATTERNS = (
    "to_q", "attn1.to_q", r".*attn2\.to_k", "^down_blocks.*", r"down_blocks\.\d+\.attn\d\.to_[qk]", "(to_q|to_k)", "to_.",
    "a?x", "[^a]", "(?:a|b)_b.c", r"\w+", "b", "(b)+", "(a|b|\\.)*", "x{1}", "[0-9]{1,2}", "b$", "^x$", "to_q$|to_k$", "", ".",
    r"[\w.]+0", "[]a]", "[a-c]+.b", "a*?b", "down.*(?:q|k)",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_patterns_match_as_peft_matches(name: str) -> None:
    for pattern in PATTERNS:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert (NamePatterns([pattern], "f").first(name) is not None) == expected, pattern
        assert full_match(pattern, name, "f") == (re.fullmatch(pattern, name) is not None), pattern
    for i in range(len(PATTERNS)):
        table = (*PATTERNS[i:], *PATTERNS[:i])
        key = peft.utils.other.get_pattern_key(table, name)
        found = NamePatterns(table, "f").first(name)
        assert (name if found is None else table[found]) == key


@settings(max_examples=300, deadline=None)
@given(st.text("ab.*+?|()[]^$\\d{1,}-", max_size=12), st.text("ab.1", max_size=8))
def test_any_pattern_matches_as_re_or_is_refused(pattern: str, name: str) -> None:
    try:
        found = NamePatterns([pattern], "f").first(name)
    except CorruptFileError:
        return
    try:
        expected = re.match(rf"(.*\.)?({pattern})$", name)
    except re.error:
        return
    assert (found is not None) == (expected is not None)


@pytest.mark.parametrize(
    "pattern", [r"(a)\1", "(?=a)b", r"\ba", "(a", "a)", "*", "a**", "[a", "a{9999}", "a\\", "(a{99}){99}", "x" * 501]
)
def test_patterns_that_need_more_are_refused(pattern: str) -> None:
    with pytest.raises(CorruptFileError, match="pattern"):
        NamePatterns([pattern], "f.safetensors").first("a")


def test_patterns_take_no_longer_than_the_file_is_long() -> None:
    """What takes ``re`` longer than the universe, and a table of as many names as modules."""
    started = time.process_time()
    assert NamePatterns([r"(\w+\.?)+!"], "f").first("a" * 400) is None
    names = [f"down_blocks.{i}.attentions.{j}.to_q" for i in range(40) for j in range(40)]
    table = NamePatterns(names, "f")
    assert [table.first(name) for name in names] == list(range(len(names)))
    with pytest.raises(CorruptFileError, match="too long to match"):
        NamePatterns([f"({'a?' * 200}){i}" for i in range(5000)], "f")
    with pytest.raises(CorruptFileError, match="at most 5,000"):
        NamePatterns(["a"] * 5_001, "f")
    assert time.process_time() - started < 60
