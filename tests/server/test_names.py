"""Clients of other servers, by their own tensors: NVIDIA's OpenAI frontend, vllm_backend, TensorRT-LLM, unary ones."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

# What NVIDIA's OpenAI frontend sends to a model whose backend is not vllm, whatever the request says.
ALWAYS = {
    "stream": False,
    "max_tokens": 16,
    "top_p": 1.0,
    "temperature": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}
SCHEMA = (  # what it leaves free has an end: at most 20 characters of space at each place
    '{"type": "object", "properties": {"word": {"enum": ["hello", "world"]}}, "required": ["word"],'
    ' "additionalProperties": false}'
)
SHORT = {"text_input": "The number", "max_tokens": 8}
MODELS = ("deepseek_v2", "deepseek_v2_sync")


def greedy(**inputs):
    return {**ALWAYS, "temperature": 0.0, **inputs}


@pytest.fixture(scope="module")
def right(server):
    return server.generate(**SHORT).json


@pytest.mark.parametrize("stream", [False, True])
def test_the_frontends_tensors(grpc_call, right, stream):
    """One string a response, counts as INT32, exactly one final response."""
    asked = greedy(text_input=SHORT["text_input"], max_tokens=8, stream=stream)
    answers, seeded = grpc_call([asked, {**ALWAYS, "text_input": "The", "seed": 7, "stop_words": ["\n", "."]}])
    assert "".join(answer.get("text_output", "") for answer in answers) == right["text_output"]
    given = [answer for answer in answers if "text_output" in answer]
    assert {answer["num_input_tokens"] for answer in given} == {right["num_input_tokens"]}
    assert sum(answer["num_output_tokens"] for answer in given) == right["num_output_tokens"]
    assert [answer["final"] for answer in answers] == [False] * (len(answers) - 1) + [True]
    assert "\n" not in seeded[0]["text_output"]


def test_the_frontends_echo(grpc_call, right):
    (answers,) = grpc_call([greedy(text_input="The number", max_tokens=8, exclude_input_in_output=False)])
    assert answers[0]["text_output"] == "The number" + right["text_output"]


def test_the_frontends_forced_tool(grpc_call):
    """tool_choice required, or by name."""
    guide = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": SCHEMA}
    answers, refused = grpc_call(
        [greedy(text_input="The", max_tokens=200, **guide), {**ALWAYS, "text_input": "The", **guide, **BAD}]
    )
    assert json.loads(answers[0]["text_output"])["word"] in ("hello", "world")
    assert "guide" in refused[0]["error"]


BAD = {"guided_decoding_guide": '{"type": "no such type"}'}


def test_text_that_begins_with_bos_gets_no_second_one(server, demo_bundle):
    """The frontend renders the chat template, which writes BOS."""
    from deepseek_trt.engines.text.text import Text

    text = Text(demo_bundle)
    bos = text.added_tokens[text.encode("")[0]] if text.encode("") else ""
    assert bos, "the demo's tokenizer puts BOS before a text"
    plain, with_bos = (server.generate(text_input=prompt, max_tokens=8).json for prompt in ("The", f"{bos}The"))
    assert plain["num_input_tokens"] == with_bos["num_input_tokens"]
    assert plain["text_output"] == with_bos["text_output"]


@pytest.mark.parametrize(
    "inputs",
    [
        {"sampling_parameters": '{"max_tokens": 8, "temperature": 0, "n": 1, "stop": null}'},
        {"sampling_parameters": '{"max_tokens": "8", "temperature": "0.0", "top_k": -1, "stop": ["never so"]}'},
        {"sampling_parameters": '{"max_tokens": 8}', "exclude_input_in_output": True, "return_finish_reason": True},
        {"parameters": {"max_tokens": 8, "ignore_eos": False, "n": 1, "detokenize": True}},
        {"sampling_param_max_tokens": 8, "streaming": False, "sampling_param_exclude_input_from_output": True},
        {"max_tokens": 8, "bad_words": "", "stop_words": "", "beam_width": 1, "length_penalty": 1.0},
        {"max_tokens": 8, "sampling_param_max_tokens": 8},
    ],
    ids=lambda inputs: "-".join(inputs),
)
@pytest.mark.parametrize("model", MODELS)
def test_the_same_by_other_names(grpc_call, server, right, model, inputs):
    asked = {"text_input": "The number", **inputs}
    ((answer, *_),) = grpc_call([dict(asked)], model=model, unary=model != MODELS[0])
    assert answer["text_output"] == right["text_output"]
    assert server.generate(model, **asked).json["text_output"] == right["text_output"]


@pytest.mark.parametrize("model", MODELS)
def test_numbers_as_text_among_a_requests_parameters(grpc_call, right, model):
    asked = {"text_input": "The number", "parameters": {"max_tokens": "8", "temperature": "0.0", "top_p": "0.5"}}
    ((answer, *_),) = grpc_call([asked], model=model, unary=model != MODELS[0])
    assert answer["text_output"] == right["text_output"]


@pytest.mark.parametrize("model", MODELS)
def test_fractions_among_a_requests_parameters(server, model):
    sampled = {"text_input": "The", "temperature": 0.7, "seed": 3, "max_tokens": 12}
    inputs = {"parameters": {**sampled, "spaces_between_special_tokens": True}}
    assert server.generate(model, **inputs).json["text_output"] == server.generate(**sampled).json["text_output"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"max_tokens": 8, "sampling_param_max_tokens": 9}, "max_tokens and sampling_param_max_tokens, one thing"),
        ({"max_tokens": 8, "sampling_parameters": '{"max_tokens": 9}'}, "max_tokens twice"),
        ({"beam_width": 2}, "beam_width 2: not supported"),
        ({"end_id": 3}, "end_id 3: not supported"),
        ({"sampling_parameters": '{"n": 2}'}, "n 2: not supported"),
        ({"sampling_parameters": '{"temprature": 2}'}, "temprature"),
        ({"lora_name": "mine"}, "there are no LoRA adapters"),
        ({"parameters": {"n": 2}}, "n 2: not supported"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_refused_by_name(grpc_call, server, model, inputs, words):
    asked = {"text_input": "The", **inputs}
    ((answer, *_),) = grpc_call([dict(asked)], model=model, unary=model != MODELS[0])
    assert words in answer["error"]
    reply = server.generate(model, **asked)
    assert (reply.status, words in str(reply.json)) == (400, True)


def test_outputs_that_are_not_wanted_are_left_out(server):
    reply = server.generate(**SHORT, return_finish_reason=False, return_num_input_tokens=False).json
    assert "finish_reason" not in reply
    assert "num_input_tokens" not in reply
    assert "num_output_tokens" in reply
    summed = server.generate(**SHORT, return_cumulative_logprob=True).json
    assert summed["cumulative_logprob"] < 0
    assert "cum_log_probs" not in summed


# The model that is not decoupled


def infer(server, model="deepseek_v2_sync", /, outputs=(), **inputs):
    kinds = {str: "BYTES", bool: "BOOL", int: "INT32", float: "FP32"}
    tensors = [
        {"name": name, "shape": [1, 1], "datatype": kinds[type(value)], "data": [value]}
        for name, value in inputs.items()
    ]
    wanted = {"outputs": [{"name": name} for name in outputs]} if outputs else {}
    return server.post(f"/v2/models/{model}/infer", {"inputs": tensors, **wanted})


def values(reply):
    assert reply.status == 200, reply.json
    return {output["name"]: output["data"] for output in reply.json["outputs"]}


def test_unary_inference(server, right):
    assert "decoupled" in str(infer(server, "deepseek_v2", **SHORT).json)
    for stream in ({}, {"stream": True}):
        got = values(infer(server, **SHORT, **stream, return_log_probs=True))
        assert got["text_output"] == [right["text_output"]]
        assert got["num_output_tokens"] == [right["num_output_tokens"]]
        assert got["finish_reason"] == [right["finish_reason"]]
        assert len(got["output_log_probs"]) == right["num_output_tokens"]
        assert got["cum_log_probs"][0] == pytest.approx(sum(got["output_log_probs"]), rel=1e-4)
    assert values(infer(server, outputs=["text_output"], **SHORT)) == {"text_output": [right["text_output"]]}


def test_unary_requests_share_the_engines_batch_and_its_weights(server, right, repository):
    assert not (repository / "deepseek_v2_sync" / "1" / "bundle").exists()
    with ThreadPoolExecutor(16) as threads:
        replies = list(threads.map(lambda _: infer(server, **SHORT), range(48)))
    assert all(values(reply)["text_output"] == [right["text_output"]] for reply in replies)
    assert server.get("/v2/models/deepseek_v2_sync/config").json["model_transaction_policy"]["decoupled"] is False


def test_unary_errors_and_time_outs_are_the_other_models(server, grpc_call):
    assert "is empty" in infer(server, text_input="").json["error"]
    assert infer(server, text_input="").status == 400
    long = {"text_input": "The", "max_tokens": 2000, "min_tokens": 2000}
    assert "timeout_ms 200" in infer(server, **long, timeout_ms=200).json["error"]
    ((answer,),) = grpc_call([long], model="deepseek_v2_sync", unary=True, timeout=200_000)
    assert "timeout_ms 200" in answer["error"]


def test_more_unary_requests_than_allowed_are_refused(serve, demo_repository):
    server = serve(demo_repository, models=MODELS)
    long = {"text_input": "The", "max_tokens": 400, "min_tokens": 400}
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: infer(server, **long), range(8)))
    statuses = [reply.status for reply in replies]
    assert statuses.count(200) >= 4
    assert all("4 requests are in flight" in str(reply.json) for reply in replies if reply.status != 200)
    assert server.stop() == 0
    assert server.left == []


def test_a_model_that_is_unloaded_is_said_by_the_one_beside_it(serve, demo_repository, right):
    server = serve(demo_repository, models=MODELS)
    assert server.manage("unload").status == 200
    assert server.wait_for(lambda: not server.ready())
    assert "deepseek_v2" in infer(server, **SHORT).json["error"]
    assert server.manage("load").status == 200
    assert values(infer(server, **SHORT))["text_output"] == [right["text_output"]]


def test_a_killed_process_of_the_unary_model_comes_back(serve, demo_repository, right):
    server = serve(demo_repository, models=MODELS)
    (stub,) = server.stub_pids("deepseek_v2_sync")
    os.kill(stub, signal.SIGKILL)
    back = server.wait_for(lambda: server.stub_pids("deepseek_v2_sync") not in ([], [stub]) and server.ready())
    assert back, server.log_tail()
    assert values(infer(server, **SHORT))["text_output"] == [right["text_output"]]


def test_sigterm_ends_unary_requests_too(serve, demo_repository):
    server = serve(demo_repository, models=MODELS)
    long = {"text_input": "The", "max_tokens": 2000, "min_tokens": 2000}
    with ThreadPoolExecutor(3) as threads:
        replies = [threads.submit(infer, server, **long) for _ in range(3)]
        assert server.wait_for(lambda: server.metric("deepseek_trt_inflight_requests") == 3)
        assert server.stop() == 0, server.log_tail()
        for reply in replies:
            assert reply.result().status == 200 or "unloaded" in str(reply.result().json)
    assert server.left == []
