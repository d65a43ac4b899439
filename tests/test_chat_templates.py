"""Labels by the chat templates of LLaVA's kin, whose answers end and begin in ways of their own."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train.conversation import IGNORE_INDEX, Conversation, encode, render

IMAGES = "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>BREAK' }}{% endfor %}"
TEXT = "{% for c in m['content'] if c['type'] == 'text' %}{{ BEFORE c['text'] AFTER }}{% endfor %}"


def template(images: str, text: str) -> str:
    """The part of a template that writes images with what follows them, and text."""
    before, _, after = text.partition("TEXT")
    parts = IMAGES.replace("BREAK", images) + TEXT.replace("BEFORE", f"'{before}' +").replace(
        "AFTER", f"+ '{after}'"
    )
    return parts


PROMPT = "{% endfor %}{% if add_generation_prompt %}{{ 'START' }}{% endif %}"
VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    + template("\\n", "TEXT ") + PROMPT.replace("START", "ASSISTANT:")
)  # fmt: skip
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    + template("\\n", "TEXT") + "{{ ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>\\n' + m['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}"
    "{% else %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)  # fmt: skip
LLAMA_3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    + template("", "\\nTEXT<|eot_id|>")
    + PROMPT.replace("START", "<|start_header_id|>assistant<|end_header_id|>\\n\\n")
)
ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    + template("", "\\nTEXT") + "{{ '<|im_end|>' }}"
    + PROMPT.replace("START", "<|im_start|>assistant\\n")
)  # fmt: skip
INTERLEAVE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    + template("", "TEXT") + "{{ '<|im_end|>\\n' }}"
    + PROMPT.replace("START", "<|im_start|>assistant\\n")
)  # fmt: skip
VIP = (
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ '###' + ('Human' if m['role'] == 'user' else 'Assistant') + ': ' }}{% endif %}"
    + template("\\n", "TEXT") + PROMPT.replace("START", "###Assistant:")
)  # fmt: skip
# by name: template, end of sequence, other special tokens, and what is written; answers are in braces
TEMPLATES = {
    "vicuna": (
        VICUNA, "</s>", (),
        "be brief USER: <image>\none? ASSISTANT:{ a cat</s>}USER: two? ASSISTANT:{ no.</s>}",
    ),
    "mistral": (
        MISTRAL, "</s>", (),
        "<<SYS>>\nbe brief\n<</SYS>>\n\n[INST] <image>\none? [/INST]{ a cat</s>} "
        "[INST] two? [/INST]{ no.</s>}",
    ),
    "llama-3": (
        LLAMA_3, "<|end_of_text|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>system<|end_header_id|>\n\n\nbe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\none?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{a cat<|eot_id|>}"
        "<|start_header_id|>user<|end_header_id|>\n\n\ntwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{no.<|eot_id|>}",
    ),
    "onevision": (
        ONEVISION, "<|im_end|>", ("<|im_start|>",),
        "<|im_start|>system \nbe brief<|im_end|><|im_start|>user <image>\none?<|im_end|>"
        "<|im_start|>assistant\n{a cat<|im_end|>}<|im_start|>user \ntwo?<|im_end|>"
        "<|im_start|>assistant\n{no.<|im_end|>}",
    ),
    "interleave": (
        INTERLEAVE, "<|endoftext|>", ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n<image>one?<|im_end|>\n"
        "<|im_start|>assistant\n{a cat<|im_end|>}\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\n{no.<|im_end|>}",
    ),
    "vip": (
        VIP, "</s>", (),
        "be brief###Human: <image>\none?###Assistant:{ a cat</s>}###Human: two?###Assistant:{ no.</s>}",
    ),
}  # fmt: skip


class TextProcessor:
    """A tokenizer of bytes with a chat template, as a processor holds it."""

    def __init__(self, chat_template: str, eos: str, specials: tuple[str, ...]):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        raw.pre_tokenizer, raw.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token="<pad>")
        self.tokenizer.add_tokens(["<image>", *specials], special_tokens=True)
        self.tokenizer.chat_template = chat_template
        self.image_token_id = self.tokenizer.convert_tokens_to_ids("<image>")

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)


def conversation(*texts: str, system: str | None = None) -> Conversation:
    """Turns of user and assistant; the first has an image."""
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for i, text in enumerate(texts):
        content = [{"type": "image"}] if i == 0 else []
        role = ("user", "assistant")[i % 2]
        messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
    return Conversation((), messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_have_labels_and_nothing_else(name):
    chat_template, eos, specials, expected = TEMPLATES[name]
    processor = TextProcessor(chat_template, eos, specials)
    turns = conversation("one?", "a cat", "two?", "no.", system="be brief")
    text, answers = render(processor, turns)
    marked = text
    for start, end in reversed(answers):
        marked = f"{marked[:start]}{{{marked[start:end]}}}{marked[end:]}"
    assert marked == expected
    ids, labels = encode(processor, turns, 1000, [1])
    assert processor.tokenizer.decode(ids) == text
    kept = [i for i, label in zip(ids, labels) if label != IGNORE_INDEX]
    assert kept == [label for label in labels if label != IGNORE_INDEX]
    assert processor.tokenizer.decode(kept) == "".join(text[start:end] for start, end in answers)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_precedes_the_first_answer_is_the_prompt_of_its_generation(name):
    chat_template, eos, specials, _ = TEMPLATES[name]
    processor = TextProcessor(chat_template, eos, specials)
    turns = conversation("assistant\n", "assistant")
    text, ((start, end),) = render(processor, turns)
    assert text[:start] == processor.apply_chat_template(turns.messages[:1], add_generation_prompt=True)
    assert text[start:end].lstrip().startswith("assistant") and end == len(text)


@pytest.mark.parametrize("answer", ["", "<s> struck </s>", "a <|im_end|>"])
def test_special_tokens_in_an_answer_do_not_end_it(answer):
    processor = TextProcessor(VICUNA, "</s>", ("<|im_end|>",))
    text, ((start, end),) = render(processor, conversation("one?", answer))
    assert text[start:end] == (f" {answer}</s>" if answer else "</s>")
