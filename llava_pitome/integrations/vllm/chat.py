"""The chat template under which vLLM writes the prompts that transformers writes."""


def template(path: str) -> str | None:
    """A checkpoint's chat template behind the token that its tokenizer starts every text with.

    transformers tokenizes what a template wrote as any text, vLLM without the tokenizer's special tokens. The
    templates of LLaVA-1.5 do not write the first one, and without it answers differ.

    Returns:
        None where the template writes it itself, or the tokenizer has none, or there is no template.

    Raises:
        ValueError: the checkpoint has no processor.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"model={path!r} has no processor that can be loaded: {error}") from error
    found, tokenizer = processor.chat_template, processor.tokenizer
    first = tokenizer.bos_token
    if not isinstance(found, str) or first is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        return None
    said = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    if processor.apply_chat_template(said, tokenize=False).startswith(first):
        return None
    return first + found
