"""Forms of Llama-2 checkpoints that people have and that the server serves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.support.checkpoints import Edit, config, edit_json, edit_tensors, remove, save_tokenizer_json, tensors
from tools.make_checkpoint import CHAT_TEMPLATE, Shape, make_checkpoint, make_tokenizer

from llama2_server.engine.checkpoint.loader import EMBEDDING, HEAD

Form = Callable[[Path], object]
"""Makes a checkpoint in a directory."""

SINGLE = "model.safetensors"
# What Meta published with Llama-2-7b-chat-hf.
PUBLISHED_GENERATION = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": 2,
    "max_length": 4096,
    "pad_token_id": 0,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.32.0.dev0",
}


def made(*edits: Edit, shards: int = 1, dtype: torch.dtype = torch.float16, **shape: Any) -> Form:
    """Return a form: a made checkpoint with some edits."""

    def make(directory: Path) -> None:
        make_checkpoint(directory, Shape(**({"context": 1024} | shape)), shards=shards, dtype=dtype)
        for edit in edits:
            edit(directory)

    return make


def drop(name: str, *keys: str) -> Edit:
    """Return an edit that removes entries of a JSON file."""

    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        kept = {key: value for key, value in content.items() if key not in keys}
        (directory / name).write_text(json.dumps(kept))

    return edit


def write_json(name: str, content: object) -> Edit:
    return lambda directory: (directory / name).write_text(json.dumps(content))


def buffers(*names: str) -> Edit:
    """Return an edit that adds rotary buffers."""
    return tensors(lambda t: t.update({name: torch.rand(8) for name in names}))


def only_tokenizer_json(edit: Callable[[dict[str, Any]], object] = lambda _: None, **options: Any) -> Edit:
    """Return an edit that replaces the tokenizer by what transformers saves."""

    def replace(directory: Path) -> None:
        path = save_tokenizer_json(directory, **options)
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))
        (directory / "tokenizer.model").unlink()

    return replace


def with_published_normalizers(document: dict[str, Any]) -> None:
    """Change a tokenizer.json to the form of Llama-2's first one."""
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    document.update(pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": steps})


def with_padding_token(document: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({"id": 600, "content": "<pad>", "special": True, **flags})


def smaller_tokenizer(directory: Path) -> None:
    make_tokenizer(directory / "tokenizer.model", 600)


def saved_by_transformers(directory: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(directory, dtype=torch.float16).save_pretrained(directory)


def linked_like_the_hub_cache(directory: Path) -> None:
    """Move all files to another folder and link to them, as in the cache of the Hub."""
    blobs = directory.with_name(f"{directory.name}-blobs")
    blobs.mkdir()
    for path in sorted(directory.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(blobs / path.name)


def leftovers(directory: Path) -> None:
    """Add files that trainers, converters and downloads leave."""
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "model.Q4_K_M.gguf",
        "README.md",
        ".gitignore",
    ):
        (directory / name).write_bytes(b"not read")
    (directory / "runs").mkdir()
    (directory / "checkpoint-500").mkdir()


def unread_shards(directory: Path) -> None:
    """Add shards next to a complete file; transformers reads the file, too."""
    save_file({"x": torch.zeros(1)}, directory / "model-00001-of-00001.safetensors")
    write_json("model.safetensors.index.json", {"weight_map": {"x": "model-00001-of-00001.safetensors"}})(directory)


def single_shard(directory: Path) -> None:
    """Name one file in an index."""
    name = "model-00001-of-00001.safetensors"
    (directory / SINGLE).rename(directory / name)
    weight_map = dict.fromkeys(load_file(directory / name), name)
    write_json("model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})(directory)


def without_metadata(directory: Path) -> None:
    save_file(load_file(directory / SINGLE), directory / SINGLE)


def old_special_tokens(directory: Path) -> None:
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = {key: {**token, "content": name} for key, name in names.items()}
    edit_json(directory, "tokenizer_config.json", **tokens)
    write_json("special_tokens_map.json", names)(directory)


def set_template(template: Any) -> Edit:
    return lambda directory: edit_json(directory, "tokenizer_config.json", chat_template=template)


def mixed_dtypes(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({name: t[name].float() for name in list(t) if "norm" in name}))


SERVED: dict[str, Form] = {
    "one file": made(),
    "float32": made(dtype=torch.float32),
    "bfloat16": made(dtype=torch.bfloat16),
    "float32 norms": made(mixed_dtypes),
    "two shards": made(shards=2),
    "seven shards": made(shards=7),
    "one shard with an index": made(single_shard),
    "unread shards": made(unread_shards),
    "no metadata in the file": made(without_metadata),
    "grouped key heads": made(kv_heads=2),
    "one key head": made(kv_heads=1),
    "odd sizes": made(hidden=48, heads=3, kv_heads=3, ffn=100, vocab=607),
    "one layer": made(layers=1),
    "tied": made(tied=True),
    "tied with an equal head": made(tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()})), tied=True),
    "tied with only a head": made(tensors(lambda t: t.update({HEAD: t.pop(EMBEDDING)})), tied=True),
    "rotary frequencies per layer": made(
        buffers(*(f"model.layers.{index}.self_attn.rotary_emb.inv_freq" for index in range(2)))
    ),
    "rotary caches": made(buffers(*(f"model.layers.0.self_attn.rotary_emb.{name}_cached" for name in ("cos", "sin")))),
    "rotary frequencies of the model": made(buffers("model.rotary_emb.inv_freq")),
    "rotary base of Code Llama": made(config(rope_theta=1e6)),
    "rope_parameters": made(
        drop("config.json", "rope_scaling"), config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    ),
    "no key heads in the config": made(drop("config.json", "num_key_value_heads")),
    "a head size in the config": made(config(head_dim=16)),
    "no head size": made(config(head_dim=None)),
    "tensor parallelism in training": made(config(pretraining_tp=2)),
    "dtype instead of torch_dtype": made(drop("config.json", "torch_dtype"), config(dtype="float16")),
    "no dtype in the config": made(drop("config.json", "torch_dtype")),
    "unknown entries": made(config(_name_or_path="/home/me/out", auto_map={"AutoModel": "x.Y"}, unsloth_version="1")),
    "entries of later versions": made(config(attention_bias=False, mlp_bias=False, attention_dropout=0.1)),
    "another norm epsilon": made(config(rms_norm_eps=1e-6)),
    "padding id -1": made(config(pad_token_id=-1)),
    "Llama-2's context": made(context=4096),
    "no generation config": made(remove("generation_config.json")),
    "published generation config": made(write_json("generation_config.json", PUBLISHED_GENERATION)),
    "several ends": made(write_json("generation_config.json", {"eos_token_id": list(range(2, 300))})),
    "more rows than tokens": made(smaller_tokenizer, vocab=640),
    "added tokens": made(smaller_tokenizer, write_json("added_tokens.json", {"<pad>": 600}), vocab=608),
    "both tokenizers": made(save_tokenizer_json),
    "only tokenizer.json": made(only_tokenizer_json()),
    "tokenizer.json, not legacy": made(only_tokenizer_json(legacy=False)),
    "tokenizer.json as published": made(only_tokenizer_json(with_published_normalizers)),
    "padding token beyond the rows": made(only_tokenizer_json(with_padding_token)),
    "template in a file": made(
        set_template(None), lambda directory: (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    ),
    "named templates": made(set_template([{"name": "default", "template": CHAT_TEMPLATE}])),
    "no template": made(drop("tokenizer_config.json", "chat_template")),
    "no tokenizer config": made(remove("tokenizer_config.json")),
    "old special tokens": made(old_special_tokens),
    "leftover files": made(leftovers),
    "links to a cache": made(linked_like_the_hub_cache),
    "saved by transformers": made(saved_by_transformers, only_tokenizer_json()),
    "saved by transformers, tied": made(saved_by_transformers, tied=True),
}
