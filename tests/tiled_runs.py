"""Short runs of train.run on tiny models that cut images into tiles, and on one of several feature layers."""

import json
from pathlib import Path

import torch
from conftest import make_processor, make_vip_llava
from test_tiled_loading import processor_of
from tiled import KINDS, make_tiled, noise

from llava_pitome.cli.options import parse
from train import options
from train.data import json_rows
from train.run import make_trainer
from train.trainer import MergingTrainer

VIP = "vip-llava"  # whose features are those of several layers, and an image is one tile
ALL = (*KINDS, VIP)
SOME = ("next-vicuna", "next-video", "onevision", VIP)  # that differ in more than the language model
USUAL = (
    "batch_size=4",
    "lora_rank=4",
    "lora_alpha=8",
    "lora_dropout=0",
    "lr=0.01",
    "tower=lora",
    "max_steps=3",
)
# height and width of images; the second row has two
SIZES = {"wide": (50, 100), "tall": (130, 40), "square": (90, 90), "long": (20, 150)}
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if loop.first else '' }}{{ 'that ' if m['role'] == 'user' else 'this' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ ' ' + c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'this' }}{% endif %}"
)


def row(question: str, answer: str, *images: str) -> dict:
    turns = [{"from": "human", "value": "<image>" * len(images) + question}, {"from": "gpt", "value": answer}]
    return {"image": [f"{name}.png" for name in images], "conversations": turns}


ROWS = [
    row("what is", "cat", "wide"),
    row("two or three", "red dog", "tall", "square"),
    row("is a cat", "dog and cat"),
    row("what", "red", "long"),
]


def words_of(folder: Path, kind: str, output: Path, *words: str, rows: list | None = None) -> list[str]:
    """The words of a run; a later word replaces an earlier one of the same key."""
    data = folder / "rows.json" if rows is None else output.with_suffix(".json")
    if rows is not None:
        data.write_text(json.dumps(rows))
    given = [f"model={folder / kind}", f"data={data}", f"images={folder}", f"output={output}", *USUAL, *words]
    return list({word.partition("=")[0]: word for word in given}.values())


def trainer_of(words: list[str]) -> MergingTrainer:
    given = parse(words, options.OPTIONS)
    return make_trainer(given, options.check(given), *json_rows(given))


def batch_of(trainer: MergingTrainer) -> dict:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def loss_of(trainer: MergingTrainer, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(batch))


def randomize(trainer: MergingTrainer) -> None:
    """Adapters that change the model: peft's do nothing at first."""
    torch.manual_seed(3)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)


def trained(trainer: MergingTrainer) -> dict[str, torch.Tensor]:
    return {n: w.detach().clone() for n, w in trainer.model.named_parameters() if w.requires_grad}


def save_all(folder: Path) -> Path:
    """Saves images, rows about them, and a checkpoint of every kind."""
    for seed, (name, size) in enumerate(SIZES.items()):
        noise(*size, seed).save(folder / f"{name}.png")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    for kind in ALL:
        model, processor = (
            (make_vip_llava(), make_processor()) if kind == VIP else (make_tiled(kind), processor_of(kind))
        )
        model.save_pretrained(folder / kind)
        processor.chat_template = TEMPLATE
        processor.save_pretrained(folder / kind)
    return folder
