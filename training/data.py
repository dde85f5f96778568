"""The training set: 100 Noto emoji of 64×64 pixels and their prompts.

The pictures come from the npm package `emoji-datasource-google` (`img/google/64`). The Noto Emoji project drew them and
licensed them under the Apache License 2.0. Fetch and unpack the package, then build the sheet:

    npm pack emoji-datasource-google@15.1.2
    tar xzf emoji-datasource-google-15.1.2.tgz
    python training/data.py package agentsd/embedded/weights

This writes `pictures.png` (all pictures on one RGBA sheet, ten in a row, in the order of the prompts) and
`prompts.json` (the prompts). Both ship with the model: training needs nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

SIZE = 64
COLUMNS = 10

# Each prompt, followed by the package's short name unless that is the prompt with underscores for spaces.
PICTURES = """
red apple=apple; banana; grapes; watermelon; strawberry; cherries; pineapple; lemon; orange=tangerine; avocado;
eggplant; carrot; corn; chili pepper=hot_pepper; broccoli; hamburger; pizza; taco; hot dog=hotdog; french fries=fries;
sushi; doughnut; cookie; birthday cake=birthday; ice cream=icecream; cupcake; cheese=cheese_wedge; popcorn;
fried egg; lollipop;
tiger; frog; panda=panda_face; fox=fox_face; pig; monkey=monkey_face; penguin; octopus; turtle; whale;
tropical fish; butterfly; ladybug; bee; owl; parrot; flamingo; elephant; unicorn=unicorn_face; dragon=dragon_face;
crab; snail; chick=hatching_chick; koala; lion=lion_face;
rose; sunflower; tulip; cactus; palm tree; four leaf clover; maple leaf; mushroom; christmas tree;
rocket; red car=car; bus; fire engine; tractor; airplane; sailboat=boat; helicopter; house=house_with_garden;
castle=european_castle; rainbow; sun=sun_with_face; star; fire; snowman; earth=earth_americas; planet=ringed_planet;
soccer ball=soccer; basketball; american football=football; eight ball=8ball; guitar; violin; trumpet; crown;
diamond=gem; gift; balloon; pumpkin=jack_o_lantern; teddy bear; umbrella=umbrella_with_rain_drops; top hat=tophat;
alien; robot=robot_face; heart; sunglasses face=sunglasses
"""


def short_names() -> dict[str, str]:
    """The picture's short name in the package, by prompt."""
    entries = [entry.strip() for entry in PICTURES.replace("\n", " ").split(";")]
    pairs = [entry.split("=") if "=" in entry else (entry, entry.replace(" ", "_")) for entry in entries]
    return dict(pairs)


def build(package: Path, out: Path) -> None:
    """Make the sheet and the prompts from the unpacked npm package."""
    files = {name: e["image"] for e in json.loads((package / "emoji.json").read_text()) for name in e["short_names"]}
    prompts = short_names()
    sheet = Image.new("RGBA", (COLUMNS * SIZE, -(-len(prompts) // COLUMNS) * SIZE))
    for k, short_name in enumerate(prompts.values()):
        picture = Image.open(package / "img/google/64" / files[short_name]).convert("RGBA")
        if picture.size != (SIZE, SIZE):
            raise ValueError(f"{short_name}: {picture.size}, expected ({SIZE}, {SIZE})")
        sheet.paste(picture, (k % COLUMNS * SIZE, k // COLUMNS * SIZE))
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "pictures.png", optimize=True)
    (out / "prompts.json").write_text(json.dumps(list(prompts), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    parser.add_argument("out", type=Path, help="folder for pictures.png and prompts.json")
    build(**vars(parser.parse_args()))
