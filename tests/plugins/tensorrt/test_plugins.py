"""What the plugins say to TensorRT: attributes, types, shapes and aliases, right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deepseek_trt.plugins.fused import FUSED_OPS
from deepseek_trt.plugins.kernels import KERNEL_OPS
from deepseek_trt.plugins.narrow_ops import PLUGIN_OPS
from deepseek_trt.plugins.tensorrt.library import PluginLibrary
from deepseek_trt.plugins.tensorrt.manifest import read_manifest

OF_OTHERS = {"MoeBiasedRouter", *(name for name in KERNEL_OPS if "Narrow" in name)}
OF_V2 = {*KERNEL_OPS, *(op.name for op in FUSED_OPS)} - OF_OTHERS

Drive = Callable[..., list[str]]

ROUTER = ["top_k:i:1:3", "n_group:i:1:4", "topk_group:i:1:2", "norm_topk_prob:i:1:0", "routed_scaling_factor:f:1:16"]
WRONG_FIELDS = [
    ("MlaDecode scale:f:1:1", 'attribute "kv_lora_rank" is missing: expected int32'),
    ("MlaDecode scale:i:1:1 kv_lora_rank:i:1:32", 'attribute "scale": expected float32 of length 1, found int32 of'),
    ("MlaDecode scale:d:1:1 kv_lora_rank:i:1:32", 'attribute "scale": expected float32 of length 1, found float64'),
    ("MlaDecode scale:f:2:1 kv_lora_rank:i:1:32", "found float32 of length 2; export the bundle again"),
    (
        "MlaDecode scale:f:1:1 kv_lora_rank:f:1:32",
        'attribute "kv_lora_rank": expected int32 of length 1, found float32',
    ),
    ("MlaDecode scale:f:1:1 kv_lora_rank:i:1:64", 'attribute "kv_lora_rank" asks for 64, but this plugin library'),
    ("MlaPrefill scale:f:1:1 softcap:f:1:1", 'attribute "softcap" is unknown'),
    (
        "MoeExperts activation:s:4:gelu",
        '"activation" is "gelu", but the plugin computes "silu" only; run this model on',
    ),
    ("MoeExperts activation:i:1:1", 'attribute "activation": expected a string, found int32 of length 1'),
    (f"MoeRouter {' '.join(ROUTER).replace('top_k:i:1:3', 'top_k:i:1:4')}", 'attribute "top_k" asks for 4, but'),
    (f"MoeRouter {' '.join(ROUTER).replace('n_group:i:1:4', 'n_group:i:1:8')}", 'attribute "n_group" asks for 8, but'),
    (f"MoeRouter {' '.join(ROUTER).replace('prob:i:1:0', 'prob:i:1:1')}", 'attribute "norm_topk_prob" asks for 1, but'),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_FIELDS)
def test_wrong_attributes_are_said(drive: Drive, fields: str, message: str) -> None:
    op, *rest = fields.split()
    output = drive([" ".join(["create", op, "build", *rest])])
    assert output[0].startswith(f"log 1 {op}: attribute")
    assert message in output[0]
    assert output[1:] == ["create null"]


def test_plan_of_another_library_is_refused(drive: Drive) -> None:
    create = "create MlaPrefill runtime scale:f:1:1"
    output = drive([create, f"{create} deepseek_trt_library:s:5:other"])
    assert "the plan does not say which plugin library it was built with" in output[0]
    assert "the plan was built with plugin library other, but this one is " in output[2]
    assert [output[1], output[3]] == ["create null", "create null"]


@pytest.mark.parametrize("ends_in_nul", [False, True])
def test_fields_survive_a_round_trip(drive: Drive, plugin_library: PluginLibrary, ends_in_nul: bool) -> None:
    library_id = read_manifest(plugin_library.path).library_id
    length = 5 if ends_in_nul else 4
    router = " ".join(["create", "MoeRouter", "build", *ROUTER])
    output = drive(
        [f"create MoeExperts build activation:s:{length}:silu", "roundtrip", router, "roundtrip", "roundtrip"]
    )
    assert output[:4] == [
        "create ok",
        "field activation 6 4 silu",
        f"field deepseek_trt_library 6 16 {library_id}",
        "create ok",
    ]
    first, second = output[5:12], output[12:]
    assert first == second
    assert first[0] == "field top_k 5 1 3"
    assert first[4] == "field routed_scaling_factor 1 1 16"


def test_creators_declare_the_contract(drive: Drive) -> None:
    types = {"int": 5, "float": 1, "string": 6}  # PluginFieldType
    lines = [
        " ".join([f"creator {op.name} '1' ''", *(f"{a.name}:{types[a.type]}" for a in op.attributes)])
        for op in PLUGIN_OPS
        if op.name in OF_V2
    ]
    assert drive(["names"]) == lines


def decode_tensors(**changes: str) -> list[str]:
    """The commands for MlaDecode's tensors, some of them changed."""
    tensors = {
        "query": "in bf16 1 2 3 4 48",
        "latent": "in bf16 2 2 3 48",
        "past_latent": "in bf16 3 9 64 48",
        "page_table": "in i32 4 2 3",
        "past_lengths": "in i32 5 2",
        "sequence_lengths": "in i32 6 2",
        "attended": "out bf16 7 2 3 4 32",
        "present_latent": "out bf16 3 9 64 48",
    }
    return ["create MlaDecode build scale:f:1:1 kv_lora_rank:i:1:32"] + [
        f"tensor {tensor}" for tensor in (tensors | changes).values() if tensor
    ]


def test_types_formats_and_aliases_follow_the_contract(drive: Drive, plugin_library: PluginLibrary) -> None:
    output = drive([*decode_tensors(), "types", "formats", "configure", "aliases"])
    what = f"MlaDecode of deepseek-trt plugin library {read_manifest(plugin_library.path).library_id}"
    assert output == [
        "create ok",
        "types 0 7 7",
        "formats 10 10 10 10 10 10 10 10",
        "configure 0",
        f"aliases -1 2 | {what} | {what}",
    ]


@pytest.mark.parametrize(
    ("changes", "command", "message"),
    [
        (
            {"query": "in f16 1 2 3 4 48"},
            "types",
            "input query is float16, but this plugin library takes bfloat16; run",
        ),
        ({"page_table": "in i64 4 2 3"}, "types", "input page_table is int64, but this plugin library takes int32"),
        ({"past_lengths": ""}, "types", "takes 6 inputs and gives 2 outputs, all of them wired; the node has 5 and 2"),
        ({"past_lengths": ""}, "configure", "takes 6 inputs and gives 2 outputs"),
        (
            {"query": "in bf16 1 2 3 8 48"},
            "configure",
            "input query, axis 2 (H) is 8, but this plugin library was made for",
        ),
        ({"past_latent": "in bf16 3 9 64 576"}, "configure", "input past_latent, axis 2 (D) is 576, but this plugin"),
        ({"past_latent": "in bf16 3 9 16 48"}, "configure", "input past_latent, axis 1 (page) is 16, but this plugin"),
        ({"query": "in bf16 1 2 3 192"}, "configure", "input query must have 4 dimensions, not 3"),
        ({"query": "in bf16 1 2 3 8 48"}, "reshape", "where it is 4; run `deepseek-trt plugins` for this model"),
        ({"latent": "in bf16 2 2 2 48"}, "reshape", "input latent, axis 1 (S) is 2, but another input's is 3"),
        ({"page_table": "in i32 4 3 3"}, "reshape", "input page_table, axis 0 (B) is 3, but another input's is 2"),
    ],
)
def test_wrong_graphs_are_said(drive: Drive, changes: dict[str, str], command: str, message: str) -> None:
    output = drive([*decode_tensors(**changes), command])
    assert output[1].startswith("log 1 MlaDecode: ")
    assert message in output[1]
    assert output[2:] == [f"{command} 1"]
