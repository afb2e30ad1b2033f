"""Records of generation as Markdown pages."""

from ..utils.tables import markdown_table, measure_title
from .results import interval_text, protocol_lines


def title_of(record: dict, key: str) -> str:
    """Return the title of a figure; for a distance or score, with the name of its feature network."""
    network = record["protocol"]["feature_network"]
    return measure_title(key, network and network["name"])


def keys_of(results: dict) -> list[str]:
    """Return the keys of all figures with intervals in a result, in order."""
    keys: dict[str, None] = {}
    for by_count in results.values():
        for figures in by_count.values():
            keys |= dict.fromkeys(key for key, value in figures.items() if isinstance(value, dict) and "low" in value)
    return list(keys)


def results_table(record: dict, results: dict) -> str:
    """Return a table with sets and token counts as rows and figures as columns."""
    keys = keys_of(results)
    rows = [
        [
            name.replace("_", " "),
            count,
            figures.get("count", ""),
            *(interval_text(figures[key]) if key in figures else "" for key in keys),
            f"{figures['median_distance']:.2f}" if "median_distance" in figures else "",
        ]
        for name, by_count in results.items()
        for count, figures in by_count.items()
    ]
    return markdown_table(
        ["images", "tokens", "count", *(title_of(record, key) for key in keys), "median distance"], rows
    )


def panels_of(record: dict) -> dict[str, dict[str, list]]:
    """Return one panel per figure, one curve per set of prompts."""
    results = record["results"]
    return {
        title_of(record, key): {
            name.replace("_", " "): [figures.get(key) for figures in by_count.values()]
            for name, by_count in results.items()
            if any(key in figures for figures in by_count.values())
        }
        for key in keys_of(results)
    }


def feature_space_tables(space: dict) -> list[str]:
    """Return tables of what the color and shape space can tell apart."""
    lines = [
        "## What the neighbor search can tell apart",
        "",
        "Features: blurred CIE Lab colors and histograms of oriented gradients, equally weighted. A distance of 1 is"
        " the root mean square over pairs of different real images. Damaged images, searched among all real images:",
        "",
    ]
    tables = [("damage", space["distorted"])]
    if space["own_image_left_out"]:
        tables.append(("style", space["own_image_left_out"]))
    for number, (title, scores) in enumerate(tables):
        keys = keys_of({"": scores})
        if number == 1:
            lines += ["", "Real images with their own entry excluded, so that only other styles can be found:", ""]
        rows = [
            [
                name,
                figures["count"],
                *(interval_text(figures[key]) if key in figures else "" for key in keys),
                f"{figures['median_distance']:.2f}",
            ]
            for name, figures in scores.items()
        ]
        lines.append(markdown_table([title, "count", *(measure_title(key) for key in keys), "median distance"], rows))
    return lines


def make_markdown(record: dict) -> str:
    """Return a record of generation as a Markdown page."""
    lines = ["# Generation", "", *protocol_lines(record), ""]
    if "names" in record:
        lines += [
            f"The search covers {record['real_images']} real images of {record['names']} names; the chance level is"
            f" {1 / record['names']:.2%} per name.",
            "",
        ]
    lines += [
        "Attributes: share of images whose nearest real image by color and shape has the requested attributes (95%"
        " Wilson intervals). Trained and held out: prompts with a style. Everyday and plain: without a style, for"
        " everyday names and for all names. Reconstructions are the upper bound for a perfect prior, shuffled prompts"
        " the lower bound. Distances between sets (95% jackknife intervals) are larger for smaller sets: compare only"
        " sets of equal size. Recognized: the feature network predicts the requested class.",
        "",
        results_table(record, record["results"]),
    ]
    for variant in record["sweep"]:
        settings = ", ".join(f"{key} {value}" for key, value in variant["sampling"].items())
        lines += ["", f"## {settings}", "", results_table(record, variant["results"])]
    if "feature_space" in record:
        lines += ["", *feature_space_tables(record["feature_space"])]
    return "\n".join(lines)
