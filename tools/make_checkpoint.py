"""Make a checkpoint with random weights in the format of Llama-2-chat, for tests and benchmarks.

    python -m tools.make_checkpoint --out llama-134m --preset 134m

Nothing is downloaded. The tokenizer is trained on a few lines of text with Llama-2's settings.
"""

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as model_proto
from torch import Tensor

TEXT = """The gRPC service answers each call in its own time, and a llama walks slowly over the hills of the Andes.
[INST] <<SYS>>
You are a helpful assistant. Answer in one sentence.
<</SYS>>

What is the capital of Peru? [/INST] The capital of Peru is Lima, where more than 10 million people live.
[INST] And who are you? [/INST] I am a small model with random weights; nobody should believe a word of this.
Once upon a time there was a child who asked the wind for a story. "Listen," said the wind, "and write it down!"
She wrote: 1, 2, 3; 1984; 3.14159; a+b=c; {"key": "value"}; http://example.com/?q=1&r=2 -- and then she slept.
    def main(argument):
        return argument * 2  # two spaces  here
Où est la gare? Die Straße führt über die Brücke. ¿Dónde está la llama? Привет, мир. 今天天气很好。 日本語のテキスト。
"""

# The published chat_template in the tokenizer_config.json of Llama-2-7b-chat-hf.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
CYCLE_LOGIT = 14.0  # of the next token of a cycle; the other logits are about 0
QUIET = 0.2  # what the layers of such a model add to the embedding, about, in multiples of its length
UNUSED = 5  # sentencepiece_model.proto: ModelProto.SentencePiece.Type
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a checkpoint; the defaults make a tiny one."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 176
    vocab: int = 600
    context: int = 128
    tied: bool = False
    cycle: int = 0
    """The model continues each token with the next one of a cycle of this many tokens, so replies repeat passages.

    At temperature 1 about 3% of the tokens leave their cycle. 0 makes a model without such cycles."""


PRESETS = {
    "tiny": Shape(),
    "134m": Shape(hidden=768, layers=12, heads=12, kv_heads=12, ffn=2048, vocab=32000, context=4096),
    "1.2b": Shape(hidden=2048, layers=22, heads=16, kv_heads=16, ffn=5632, vocab=32000, context=4096),
    "7b": Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008, vocab=32000, context=4096),
}


def make_checkpoint(
    directory: Path,
    shape: Shape,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float16,
    trained_dtype: torch.dtype | None = None,
    logit_deviation: float = 1.0,
    seed: int = 0,
) -> Path:
    """Write a checkpoint into `directory`, create the directory if needed, and return it.

    The numbers are rounded to `trained_dtype`, if given, before they are stored as `dtype`. Llama-2 was trained in
    bfloat16 and published in float16. `logit_deviation` is about the standard deviation of the logits of one token;
    trained models have 3 to 5. It has no effect on a tied output layer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer(directory / "tokenizer.model", shape.vocab)
    _write_json(directory / "config.json", _config(shape, dtype))
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    _write_weights(directory, shape, shards, _Numbers((trained_dtype or dtype, dtype), logit_deviation, seed))
    return directory


def make_tokenizer(path: Path, vocab_size: int) -> None:
    """Train a byte-fallback BPE tokenizer, and pad it to `vocab_size` with pieces that no text contains."""
    model = model_proto.ModelProto.FromString(_train_tokenizer(vocab_size))  # type: ignore[attr-defined]
    for index in range(len(model.pieces), vocab_size):
        model.pieces.add(piece=f"<unused_{index}>", score=-index, type=UNUSED)
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString())


def _train_tokenizer(vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,  # rare characters become bytes, as in a real vocabulary
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _config(shape: Shape, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
        "chat_template": CHAT_TEMPLATE,
    }


@dataclass(frozen=True)
class _Numbers:
    """The random numbers of a checkpoint."""

    dtypes: tuple[torch.dtype, torch.dtype]
    """What they are rounded to, and what they are stored as."""
    logit_deviation: float
    seed: int


def _write_weights(directory: Path, shape: Shape, shards: int, numbers: _Numbers) -> None:
    names = list(_tensor_shapes(shape))
    per_shard = -(-len(names) // shards)
    generator, dtypes = torch.Generator().manual_seed(numbers.seed), numbers.dtypes
    weight_map: dict[str, str] = {}
    embedding: Tensor | None = None
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = dict(names[index * per_shard : (index + 1) * per_shard])
        factors = {"lm_head.weight": numbers.logit_deviation}
        tensors = {name: _random(size, generator, dtypes, factors.get(name, 1.0)) for name, size in part.items()}
        embedding = tensors.get("model.embed_tokens.weight", embedding)
        if shape.cycle and embedding is not None:
            _make_cyclic(tensors, embedding, shape, dtypes)
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    head_dim = shape.hidden // shape.heads
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (shape.hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (shape.hidden, shape.hidden)
        yield f"{layer}.self_attn.k_proj.weight", (shape.kv_heads * head_dim, shape.hidden)
        yield f"{layer}.self_attn.v_proj.weight", (shape.kv_heads * head_dim, shape.hidden)
        yield f"{layer}.self_attn.o_proj.weight", (shape.hidden, shape.hidden)
        yield f"{layer}.post_attention_layernorm.weight", (shape.hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (shape.ffn, shape.hidden)
        yield f"{layer}.mlp.up_proj.weight", (shape.ffn, shape.hidden)
        yield f"{layer}.mlp.down_proj.weight", (shape.hidden, shape.ffn)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def _random(
    shape: tuple[int, ...], generator: torch.Generator, dtypes: tuple[torch.dtype, torch.dtype], factor: float
) -> Tensor:
    """Return random values that preserve the magnitude of activations, so that every layer has an effect."""
    values = torch.randn(shape, generator=generator)
    values = 1 + values / 10 if len(shape) == 1 else values * (factor * shape[1] ** -0.5)
    return values.to(dtypes[0]).to(dtypes[1])


def _make_cyclic(
    tensors: dict[str, Tensor], embedding: Tensor, shape: Shape, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Let the output layer prefer the next token of each token's cycle, and the layers hardly change that."""
    # Each layer adds twice, independent numbers of about 1, where those of the embedding are about hidden**-0.5.
    quiet = QUIET * (2 * shape.layers * shape.hidden) ** -0.5
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = (quiet * tensor.float()).to(dtypes[0]).to(dtypes[1])
        elif name == "lm_head.weight":
            ids = torch.arange(len(tensor))
            before = ids - ids % shape.cycle + (ids - 1) % shape.cycle
            scale = CYCLE_LOGIT * tensor.shape[1] ** -0.5
            tensors[name] = (scale * embedding[before.clamp(max=len(tensor) - 1)].float()).to(dtypes[0]).to(dtypes[1])


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument(
        "--preset", choices=PRESETS, default="tiny", help="size; the options below override parts of it"
    )
    for name in asdict(Shape()):
        if name != "tied":
            parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument(
        "--tied", action="store_const", const=True, help="use one matrix for the embedding and the output layer"
    )
    parser.add_argument("--shards", type=int, default=1, help="number of safetensors files")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--trained-dtype", choices=DTYPES, help="round the numbers to this dtype first")
    parser.add_argument("--logit-deviation", type=float, default=1.0, help="standard deviation of the logits")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Make the checkpoint that the command line describes."""
    arguments = _parse_arguments()
    given = {name: value for name in asdict(Shape()) if (value := getattr(arguments, name)) is not None}
    shape = replace(PRESETS[arguments.preset], **given)
    make_checkpoint(
        arguments.out,
        shape,
        shards=arguments.shards,
        dtype=DTYPES[arguments.dtype],
        trained_dtype=DTYPES[arguments.trained_dtype] if arguments.trained_dtype else None,
        logit_deviation=arguments.logit_deviation,
        seed=arguments.seed,
    )
    size = sum(path.stat().st_size for path in arguments.out.glob("*.safetensors"))
    print(f"{arguments.out}: {size / 1e6:.0f} MB of weights")


if __name__ == "__main__":
    main()
