"""What a command says of itself when it is asked for help."""

from llava_pitome.cli.options import Option, usage


def helped(words: list[str], doc: str | None, options: dict[str, Option]) -> bool:
    """Prints a command's description and its keys where the words ask for them; whether they did."""
    if not {"help", "--help", "-h"} & set(words):
        return False
    print(f"{doc}\nKeys:\n{usage(options)}")
    return True
