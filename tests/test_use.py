"""What users do with a saved checkpoint: pipelines, devices, precisions, quantized weights, a server."""

import base64
import importlib.util
import inspect
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from tiny import TEXT_SIZES, VISION_SIZES, tiny_image, tiny_model, tiny_processor, tiny_seq2seq
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, CLIPVisionConfig, Qwen2Config, pipeline


QUESTIONS = ["What colour is the left square?", "Which shape is above the other circle?", "red or green?"]
NUM_LATENTS = 3
NEW_TOKENS = 6
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}  # 4-bit weights come in blocks of 64


def build(name: str):
    if name == "encoder-decoder":
        return tiny_seq2seq()
    if name == "cross-attention":
        return tiny_model("marian")
    return tiny_model(
        Qwen2Config(**TEXT_SIZES | WIDE, num_key_value_heads=2, tie_word_embeddings=False),
        CLIPVisionConfig(**VISION_SIZES | WIDE),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved checkpoints, made when a test first asks for one."""
    made = {}

    def folder_of(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoint")
            model = build(name)
            processor = tiny_processor(model)
            processor.num_latents = NUM_LATENTS
            for part in (model, processor):
                part.save_pretrained(made[name])
        return made[name]

    return folder_of


def loaded(folder, **options):
    return AutoModel.from_pretrained(folder, **options), AutoProcessor.from_pretrained(folder, backend="pil")


def asked(processor, num_rows: int = len(QUESTIONS)) -> dict:
    """A batch of questions of different lengths, each about a picture of its own."""
    images = [tiny_image(seed) for seed in range(num_rows)]
    return processor(images=images, text=QUESTIONS[:num_rows], return_tensors="pt", padding=True)


def new_tokens(model, processor, inputs) -> torch.Tensor:
    """Greedy continuation (B, new)."""
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens[:, inputs[processor.prompt_names[0]].shape[1] :]


@pytest.mark.parametrize("name", ["decoder", "cross-attention", "encoder-decoder"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_answers_batches_of_chats_and_of_plain_questions(folders, name, batch_size):
    model, processor = loaded(folders(name))
    expected = []
    for seed, question in enumerate(QUESTIONS):
        inputs = processor(images=tiny_image(seed), text=question, return_tensors="pt")
        expected.append(processor.decode(new_tokens(model, processor, inputs)[0], skip_special_tokens=True))
    assert len(set(expected)) > 1
    pipe = pipeline("image-text-to-text", model=str(folders(name)), processor=processor)
    options = {"max_new_tokens": NEW_TOKENS, "return_full_text": False, "batch_size": batch_size}
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": tiny_image(i)}, {"type": "text", "text": question}]}]
        for i, question in enumerate(QUESTIONS)
    ]
    plain = pipe(images=[tiny_image(seed) for seed in range(len(QUESTIONS))], text=QUESTIONS, **options)
    for answers in (pipe(text=chats, **options), plain):
        texts = [
            answer[0]["generated_text"] if isinstance(answer, list) else answer["generated_text"] for answer in answers
        ]
        assert texts == expected


@pytest.mark.parametrize("name", ["decoder", "cross-attention", "encoder-decoder"])
@pytest.mark.parametrize("options", [{"device_map": "auto", "dtype": "auto"}, {"device_map": {"": "cpu"}}])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_device_map_changes_nothing(folders, name, options, tolerance):
    model, processor = loaded(folders(name))
    inputs = asked(processor)
    mapped, _ = loaded(folders(name), **options)
    with torch.no_grad():
        torch.testing.assert_close(mapped(**inputs).logits, model(**inputs).logits, atol=tolerance, rtol=0)
    assert torch.equal(new_tokens(mapped, processor, inputs), new_tokens(model, processor, inputs))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "latent"])
def test_every_attention_generates_the_same(folders, attention):
    model, processor = loaded(folders("decoder"))
    other, _ = loaded(folders("decoder"), attn_implementation=attention)
    assert other.get_decoder().config._attn_implementation == attention
    inputs = asked(processor)
    assert torch.equal(new_tokens(other, processor, inputs), new_tokens(model, processor, inputs))


def test_the_saved_precision_is_loaded_where_auto_is_asked_for(folders, tmp_path):
    model, _ = loaded(folders("decoder"))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    halved = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert {weight.dtype for weight in halved.parameters()} == {torch.bfloat16}


# Of logits with a spread of 1; a quantized weight is off by a part of 127, or of 15, of the largest in its block.
@pytest.mark.parametrize("bits, tolerance", [(8, 0.05), (4, 0.5)])
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="needs pip install mmcoconut[quantization], which every process would import with peft",
)
def test_quantized_weights_think_and_answer(folders, bits, tolerance):
    model, processor = loaded(folders("decoder"))
    options = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    quantized, _ = loaded(folders("decoder"), quantization_config=options, device_map="cpu")
    assert quantized.get_memory_footprint() < model.get_memory_footprint()
    inputs = asked(processor)
    with torch.no_grad():
        expected, found = model(**inputs), quantized(**inputs)
        without = quantized(
            **processor(
                images=[tiny_image(seed) for seed in range(3)],
                text=QUESTIONS,
                num_latents=0,
                return_tensors="pt",
                padding=True,
            )
        ).logits[:, -1]
    error = (found.logits[:, -1] - expected.logits[:, -1]).abs().mean() / expected.logits[:, -1].std()
    assert error < tolerance
    assert (without - found.logits[:, -1]).abs().mean() / expected.logits[:, -1].std() > error
    assert new_tokens(quantized, processor, inputs).shape == (len(QUESTIONS), NEW_TOKENS)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, log, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-4000:])


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """The address of a server of a checkpoint, in a process of its own."""
    for library in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(library, reason="the server needs pip install mmcoconut[serve]")
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable,
        "-m",
        "mmcoconut.serve",
        str(folders("decoder")),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    wait_for(f"http://localhost:{port}/health", process, log)
    yield f"http://localhost:{port}/v1"
    process.terminate()
    process.wait(timeout=30)


def request_of(folder, **options) -> dict:
    buffer = io.BytesIO()
    tiny_image().save(buffer, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTIONS[0]}]
    return {
        "model": str(folder),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        **options,
    }


@pytest.mark.parametrize("num_latents", [None, 0, 5])
def test_a_client_asks_a_server_about_a_picture_and_sets_the_thoughts(folders, server, num_latents):
    from openai import OpenAI

    model, processor = loaded(folders("decoder"))
    inputs = processor(images=tiny_image(), text=QUESTIONS[0], return_tensors="pt", num_latents=num_latents)
    expected = processor.decode(new_tokens(model, processor, inputs)[0], skip_special_tokens=True)
    chosen = {} if num_latents is None else {"extra_body": {"chat_template_kwargs": {"num_latents": num_latents}}}
    client = OpenAI(base_url=server, api_key="none")
    answer = client.chat.completions.create(**request_of(folders("decoder"), **chosen))
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    stream = client.chat.completions.create(**request_of(folders("decoder"), stream=True, **chosen))
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(parts) == expected.removesuffix("\N{REPLACEMENT CHARACTER}")  # a stream holds back half a character


def posted(server: str, request: dict) -> tuple[int, dict]:
    """Status and JSON of the answer to a chat request."""
    data = json.dumps(request).encode()
    asked = urllib.request.Request(f"{server}/chat/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def with_picture(request: dict, url: str) -> dict:
    [message] = request["messages"]
    content = [{"type": "image_url", "image_url": {"url": url}}, *message["content"][1:]]
    return {**request, "messages": [{**message, "content": content}]}


def test_a_mistake_in_a_request_is_answered_with_what_is_wrong(folders, server):
    right = request_of(folders("decoder"))
    for request, message in (
        ({**right, "chat_template_kwargs": {"num_latents": "3"}}, "num_latents='3'"),
        ({**right, "chat_template_kwargs": {"num_latents": -1}}, "num_latents=-1"),
        ({**right, "chat_template_kwargs": {"markers": "none"}}, "the checkpoint decides its markers"),
        ({**right, "chat_template_kwargs": [3]}, "must be a mapping"),
        ({**right, "max_tokens": "many"}, "many"),
        (with_picture(right, "data:image/png;base64,@@no-picture@@"), "image"),
        (with_picture(right, "data:image/png;base64,aGVsbG8="), "image"),
        (with_picture(right, "/etc/hostname"), "this server reads no files of its machine"),
        (with_picture(right, "file:///etc/hostname"), "or start the server with --allow-local-files"),
        (with_picture(right, "maze.png"), "image 'maze.png'"),
        ({"model": right["model"], "max_tokens": 4}, "lacks 'messages'"),
    ):
        status, answer = posted(server, request)
        assert status == 400, answer
        assert message in answer["error"]["message"]
    assert posted(server, right)[0] == 200


def test_a_server_writes_as_much_as_the_checkpoints_recipe_says_where_a_request_does_not(folders, server):
    folder = folders("decoder")
    request = {key: value for key, value in request_of(folder).items() if key != "max_tokens"}
    (folder / "recipe.yaml").write_text("max_new_tokens: 5\n")
    status, answer = posted(server, request)
    (folder / "recipe.yaml").unlink()
    assert (status, answer["usage"]["completion_tokens"]) == (200, 5)


@pytest.mark.parametrize(
    "asset, reads", [({"data_base64": "aGk="}, True), ({"path": "/etc/x"}, False), ("a.png", False)]
)
def test_a_request_for_decisions_names_no_file_of_the_server(asset, reads):
    import asyncio

    from mmcoconut.serve import CheckedDecisions

    class Handler:
        async def handle_request(self, body, request_id):
            return body

    body = {"state": "x", "assets": {"a": asset}}
    asked = CheckedDecisions(Handler()).handle_request(body, "1")
    if reads:
        assert asyncio.run(asked) == body
    else:
        with pytest.raises(ValueError, match="this server reads no files of its machine"):
            asyncio.run(asked)


@pytest.mark.parametrize(
    "part, reads",
    [
        ({"image_url": {"url": "https://hub.test/a.png"}}, True),
        ({"image_url": {"url": "DATA:image/png;base64,aGk="}}, True),
        ({"image_url": "http://hub.test/a.png"}, True),
        ({"text": "/etc/hostname"}, True),
        ({"image_url": {"url": "/etc/hostname"}}, False),
        ({"image_url": "file:///etc/hostname"}, False),
        ({"video_url": {"url": "a.mp4"}}, False),
        ({"audio_url": {"url": "~/a.wav"}}, False),
        ({"image_url": None}, False),
    ],
)
@pytest.mark.parametrize("field", ["messages", "input"])
def test_a_request_reads_files_of_the_server_only_where_the_server_was_started_so(part, reads, field):
    import asyncio

    from mmcoconut.serve import CheckedHandler

    class Handler:
        chat_template_kwargs = {}

        async def handle_request(self, body, request_id):
            return body

    body = {"max_tokens": 4, field: [{"role": "user", "content": [part]}]}
    asked = CheckedHandler(Handler(), "max_tokens", None, local_files=True).handle_request(body, "1")
    assert asyncio.run(asked) == body
    asked = CheckedHandler(Handler(), "max_tokens", None).handle_request(body, "1")
    if reads:
        assert asyncio.run(asked) == body
    else:
        with pytest.raises(ValueError, match="this server reads no files of its machine"):
            asyncio.run(asked)


def test_a_prompt_that_leaves_no_room_is_answered_with_the_numbers():
    """A decoder with a table of positions, through the handler, without a server of its own."""
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient
    from transformers.cli.serving import server as serving

    from mmcoconut.serve import with_clear_errors

    model, messages = (
        tiny_model("gpt2"),
        "The longest prompt has 120 tokens.*max_tokens=64.* 128 positions.*fewer thoughts",
    )

    class Handler:
        chat_template_kwargs = {}

        async def handle_request(self, body, request_id):
            return model.generate(torch.full((1, 120), 7), max_new_tokens=body["max_tokens"]).tolist()

    class Manager:
        force_model = None

        def shutdown(self):
            pass

    parts = dict.fromkeys(inspect.signature(serving.build_server).parameters)
    handlers = {name: Handler() for name in parts if name.endswith("_handler")}
    del parts["model_manager"]
    app = with_clear_errors(serving.build_server)(Manager(), **{**parts, **handlers, "enable_cors": False})
    with TestClient(app) as client:
        answer = client.post("/v1/chat/completions", json={"messages": [], "max_tokens": 64})
    assert answer.status_code == 400
    assert re.match(messages, answer.json()["error"]["message"])


def test_a_server_of_a_folder_that_is_not_there_says_so_in_one_line(tmp_path, capsys):
    pytest.importorskip("uvicorn")
    from mmcoconut import serve
    from mmcoconut.errors import run_command

    with pytest.raises(SystemExit, match="2"):
        run_command(lambda _: serve.main([str(tmp_path / "nowhere"), "--port", "1"]))
    assert re.fullmatch(
        "model = .*nowhere': no such folder: give an existing folder or a Hub id\n", capsys.readouterr().err
    )
