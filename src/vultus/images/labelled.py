"""Sheets of images with the words that a reader needs: a label for each row and column, a caption for each image."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LEAST = 96  # pixels of an image that has room for the words above it
FONT_SIZE = 13
LEFT = 150  # most pixels of the column of row labels
_GAP, _MARGIN = 2, 4
_COLOURS = {False: ("white", "black"), True: ("#2b2a28", "#ececec")}  # of ground and text; dark for pages


def labelled_sheet(
    images: Sequence[Image.Image],
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[str] = (),
    font_size: int = FONT_SIZE,
    least: int = LEAST,
    dark: bool = False,
) -> Image.Image:
    """Images of one size, `columns` in a row, with labels at the left and above, and captions below the images.

    Labels are wrapped; what does not fit ends with an ellipsis. A caption has one line. Images less than `least` pixels
    wide are enlarged by a whole factor. `dark` gives light text on a dark ground, which suits light and dark pages.
    """
    font = ImageFont.load_default(font_size)
    line = font_size + 4
    factor = max(1, -(-least // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    left = [_wrapped(label, font, LEFT) for label in row_labels]
    heads = [_wrapped(label, font, width - _MARGIN) for label in column_labels]
    indent = max((round(font.getlength(text)) for lines in left for text in lines), default=-2 * _MARGIN) + 2 * _MARGIN
    header = line * max((len(lines) for lines in heads), default=0) + (_MARGIN if heads else 0)
    below = line if captions else 0
    step = height + below + _GAP
    rows = -(-len(images) // columns)
    ground, ink = _COLOURS[dark]
    sheet = Image.new("RGB", (indent + columns * (width + _GAP) - _GAP, header + rows * step - _GAP), ground)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heads):
        for number, text in enumerate(lines):
            place = (indent + column * (width + _GAP) + 2, header - (len(lines) - number) * line - 1)
            draw.text(place, text, fill=ink, font=font)
    for row, lines in enumerate(left):
        lines = lines[: max(1, (height + below) // line)]
        top = header + row * step + max(0, (height - len(lines) * line) // 2)
        for number, text in enumerate(lines):
            draw.text((_MARGIN, top + number * line), text, fill=ink, font=font)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x, y = indent + column * (width + _GAP), header + row * step
        shown = image if factor == 1 else image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(shown, (x, y))
        if index < len(captions):
            draw.text((x + 2, y + height), _cut(captions[index], font, width - _MARGIN), fill=ink, font=font)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(_cut(word, font, width))
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
