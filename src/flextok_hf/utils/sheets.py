"""Contact sheets: grids of images with column titles, for instance one column per number of tokens."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


BACKGROUND = "white"
INK = "black"


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    cell_size: int | None = None,
    gap: int = 8,
    row_titles: Sequence[str] | None = None,
) -> Image.Image:
    """Arrange images on one white sheet with a title above each column, and on request above each row.

    Args:
        rows: one sequence of images per row; each row has one image per title.
        titles: one short line per column.
        cell_size: side of the square that each image is fitted into, in pixels; defaults to that of the largest
            image, but at least 128 so that images from small models are visible.
        gap: white pixels between and around the images.
        row_titles: one line per row, such as its prompt; shortened to the width of the sheet.

    Returns:
        An RGB image.

    Raises:
        ValueError: there are no images, or a row and the titles, or the rows and their titles, differ in length.
    """
    if not rows or not titles:
        raise ValueError(f"`rows` and `titles` need at least one entry each, got {len(rows)} and {len(titles)}")
    for number, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(f"`rows[{number}]` has {len(row)} images, but there are {len(titles)} `titles`")
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"`row_titles` has {len(row_titles)} titles, but there are {len(rows)} `rows`")
    if cell_size is None:
        cell_size = max(128, *(max(image.size) for row in rows for image in row))

    font = ImageFont.load_default(size=max(12, cell_size // 10))
    title_height = max(_text_size(title, font)[1] for title in titles)
    step = cell_size + gap
    top = gap + title_height + gap  # of the first row
    above = 0 if row_titles is None else _text_size("Ag", font)[1] + gap // 2  # title of a row
    sheet = Image.new("RGB", (gap + len(titles) * step, top + len(rows) * (above + step)), BACKGROUND)

    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        width, _ = _text_size(title, font)
        draw.text((gap + column * step + (cell_size - width) // 2, gap), title, fill=INK, font=font)
    for row_number, row in enumerate(rows):
        top_of_row = top + row_number * (above + step)
        if row_titles is not None:
            draw.text((gap, top_of_row), _shorten(row_titles[row_number], sheet.width - 2 * gap, font), INK, font)
        for column, image in enumerate(row):
            fitted = _fit(image, cell_size)
            left = gap + column * step + (cell_size - fitted.width) // 2
            sheet.paste(fitted, (left, top_of_row + above + (cell_size - fitted.height) // 2))
    return sheet


def token_count_title(num_tokens: int) -> str:
    """Return the column title for a number of tokens: "1 token", "4 tokens"."""
    return "1 token" if num_tokens == 1 else f"{num_tokens} tokens"


def _fit(image: Image.Image, cell_size: int) -> Image.Image:
    # Enlarged images keep their pixels visible: smoothing would flatter a small model.
    scale = cell_size / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, resample)


def _text_size(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> tuple[int, int]:
    _, _, right, bottom = font.getbbox(text)
    return round(right), round(bottom)


def _shorten(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    line = " ".join(text.split())[:400]  # more never fits
    if _text_size(line, font)[0] <= width:
        return line
    while line and _text_size(line + " ...", font)[0] > width:
        line = line[:-1]
    return line + " ..."
