"""The script that removes from the image's environment what the server never loads."""

from pathlib import Path

from tools.container.prune import RULES, prune, size

REMOVED = (
    "torch/test/pow_test",
    "torch/bin/test_api",
    "torch/bin/TCPStoreTest",
    "torch/bin/protoc-3.13.0.0",
    "torch/include/ATen/ATen.h",
    "torch/share/cmake/Torch/TorchConfig.cmake",
    "sympy/core/tests/test_basic.py",
    "numpy/tests/test_all.py",
    "transformers/models/bert/modeling_bert.py",
)
KEPT = (
    "torch/bin/torch_shm_manager",
    "torch/testing/__init__.py",
    "torch-2.0.dist-info/licenses/third_party/tests/LICENSE",
    "transformers/models/__init__.py",
    "transformers/models/auto/configuration_auto.py",
    "transformers/models/llama/configuration_llama.py",
    "sympy/core/basic.py",
)


def test_prune_removes_only_what_the_rules_name(tmp_path: Path) -> None:
    """The rules remove tests, headers and other models; licenses and each package stay."""
    for name in (*REMOVED, *KEPT):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    before = size(tmp_path)
    freed = prune(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(KEPT)
    assert sum(freed.values()) == before - size(tmp_path) == sum(map(len, REMOVED))
    assert [rule.reason for rule in RULES if not freed[rule.reason]] == []
