"""Every mask, score modification and schedule has a picture, and a page shows it."""

import dataclasses

import seqattn
from docs import pictures
from tests.pages import ROOT
from train.update import schedules


def public(kind: type) -> set[type]:
    offered = (getattr(seqattn, name) for name in seqattn.__all__)
    return {each for each in offered if isinstance(each, type) and issubclass(each, kind) and each is not kind}


def test_every_mask_is_drawn():
    assert {type(mask) for _, mask, _ in pictures.MASKS.values()} >= public(seqattn.Mask)


def test_every_score_modification_is_drawn():
    drawn = {type(mod) for _, mod in pictures.SCORE_MODS.values()}
    assert drawn | {seqattn.SoftCap, seqattn.ScoreFunction} == public(seqattn.ScoreMod)  # a picture and a wrapper


def test_every_schedule_is_drawn():
    own = {each for each in vars(schedules).values() if dataclasses.is_dataclass(each)} - {schedules.Checked}
    assert {type(schedule) for _, schedule in pictures.SCHEDULES.values()} == own


def test_every_picture_is_drawn_and_on_a_page(tmp_path):
    pictures.draw_all(tmp_path)
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md"))
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert {name for name in drawn if f"_generated/{name}" not in pages} == set()
    assert all(path.with_suffix(".png").stat().st_size > 1_000 for path in tmp_path.glob("*.svg"))
