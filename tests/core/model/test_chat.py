"""Chat against transformers' own tokenisation, with a tiny byte-level tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from grpo_core.errors import CheckpointError, ConfigError, DataError
from grpo_core.model.chat import Chat
from grpo_core.model.plugin import ChatSpec
from grpo_core.rollout.stop import StopText

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "hello world, hello",
    "12 + 34 = 46",
    "the user said hello",
    "\N{SNOWMAN} na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve",
]
SPECIAL = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MESSAGES = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello \N{GRINNING FACE}, what is 12+34?"},
)


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE, bos: bool = False, **names: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<|endoftext|>"} | names))
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    write_tokenizer(tmp_path)
    return Chat.from_folder(tmp_path, ChatSpec(stop_tokens=("<|im_end|>", "<|never_heard_of|>")))


def test_messages_become_the_ids_of_apply_chat_template(chat: Chat) -> None:
    theirs = chat.tokenizer.apply_chat_template(
        [dict(message) for message in MESSAGES], add_generation_prompt=True, return_dict=False
    )
    assert list(chat.encode(MESSAGES)) == theirs
    assert chat.tokenizer.decode(theirs).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_gets_the_special_tokens_of_the_tokenizer(bos: bool, tmp_path: Path) -> None:
    fast = write_tokenizer(tmp_path, bos=bos)
    chat = Chat.from_folder(tmp_path)
    ids = chat.encode("hello world")
    assert list(ids) == fast("hello world")["input_ids"]
    assert (ids[0] == 1) is bos


def test_template_adds_no_second_beginning_of_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bos=True)
    assert 1 not in Chat.from_folder(tmp_path).encode(MESSAGES)


def test_decode_is_text_without_special_tokens(chat: Chat) -> None:
    text = "hello \N{GRINNING FACE} , 'world' ."
    ids = chat.encode(text)
    assert chat.decode([2, *ids, 3]) == text
    assert chat.decode([]) == ""


def test_stop_ids_come_from_family_tokenizer_and_configs(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert Chat.from_folder(tmp_path).stop_token_ids == (1,)
    spec = ChatSpec(stop_tokens=("<|im_end|>", "<|never_heard_of|>"))
    assert Chat.from_folder(tmp_path, spec).stop_token_ids == (1, 3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9, "model_type": "llama"}))
    chat = Chat.from_folder(tmp_path, ChatSpec(stop_tokens=("<|im_end|>",)))
    assert chat.stop_token_ids == (1, 3, 7, 9)
    assert chat.eos_token_id == 1


def test_an_ordinary_word_of_the_vocabulary_is_no_stop_token(tmp_path: Path) -> None:
    fast = write_tokenizer(tmp_path)
    assert "hello" in fast.get_vocab()
    assert Chat.from_folder(tmp_path, ChatSpec(stop_tokens=("hello",))).stop_token_ids == (1,)


def test_model_without_chat_template_takes_text_only(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template=None)
    chat = Chat.from_folder(tmp_path)
    assert chat.encode("hello")
    with pytest.raises(DataError, match="no chat template"):
        chat.encode(MESSAGES)


def test_messages_that_the_template_refuses(chat: Chat) -> None:
    with pytest.raises(DataError, match="unknown role"):
        chat.encode(({"role": "narrator", "content": "once"},))


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="tokenizer"):
        Chat.from_folder(tmp_path)


def test_nothing_that_ends_a_turn(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(CheckpointError, match="nothing ends a completion"):
        Chat.from_folder(tmp_path)


@pytest.mark.parametrize("stop", ["\N{GRINNING FACE}", "d\N{GRINNING FACE}!", "orld", "\N{SNOWMAN} h"])
def test_stop_string_over_token_and_byte_boundaries(chat: Chat, stop: str) -> None:
    text = "hello world\N{GRINNING FACE}! \N{SNOWMAN} hello"
    ids = chat.encode(text)
    assert "\N{REPLACEMENT CHARACTER}" in chat.decode(ids[:4]) or len(ids) > 8
    watch = StopText(chat.decode, (stop,))
    fired = next(index for index, token in enumerate(ids) if watch.push(token, check=True))
    assert stop in chat.decode(ids[: fired + 1]) and stop not in chat.decode(ids[:fired])
    assert watch.text == text[: text.index(stop)]


def test_incremental_text_equals_the_whole(chat: Chat) -> None:
    text = "hello \N{GRINNING FACE}\N{SNOWMAN}\N{GRINNING FACE} world 12+34"
    ids = chat.encode(text)
    assert any(chat.decode([token]).endswith("\N{REPLACEMENT CHARACTER}") for token in ids)
    watch = StopText(chat.decode, ("never",))
    assert not any(watch.push(token, check=True) for token in ids)
    assert watch.text == text


def test_thinking_is_switched_by_the_variable_of_the_template(tmp_path: Path) -> None:
    switch = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
    write_tokenizer(tmp_path, template=TEMPLATE + switch)
    spec = ChatSpec(stop_tokens=("<|im_end|>",), thinking="enable_thinking")
    texts = {}
    for thinking in ("auto", "on", "off"):
        chat = Chat.from_folder(tmp_path, spec, thinking=thinking)
        texts[thinking] = chat.tokenizer.decode(chat.encode(MESSAGES))
    assert texts["auto"] == texts["on"] and texts["off"] == texts["on"] + "<think></think>"


@pytest.mark.parametrize("spec", [ChatSpec(), ChatSpec(thinking="enable_thinking")])
def test_thinking_without_a_switch_in_the_template_is_refused(spec: ChatSpec, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.thinking 'off' has no effect"):
        Chat.from_folder(tmp_path, spec, thinking="off")


def test_decode_is_that_of_transformers(chat: Chat) -> None:
    draw = random.Random(0)
    size = len(chat.tokenizer)
    for _ in range(200):
        ids = [draw.randrange(size) for _ in range(draw.randrange(12))]
        assert chat.decode(ids) == chat.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_a_tokenizer_that_decodes_in_its_own_way_is_asked(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    class Loud(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return str(super()._decode(*args, **kwargs)).upper()

    write_tokenizer(tmp_path)
    chat = Chat(Loud.from_pretrained(tmp_path), stop_token_ids=(1,), name="loud")
    assert chat.decode(chat.encode("hello")) == "HELLO"


def test_a_plain_tokenizer_equals_the_one_that_auto_tokenizer_finds(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, bos=True)
    mine = Chat.from_folder(tmp_path, ChatSpec(stop_tokens=("<|im_end|>",))).tokenizer
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(mine) is type(theirs) and mine.chat_template == theirs.chat_template
    assert mine.all_special_tokens == theirs.all_special_tokens
    for text in TEXTS:
        assert mine(text)["input_ids"] == theirs(text)["input_ids"]
