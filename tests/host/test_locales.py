"""Names, descriptions and tooltips in seven languages: nothing is missing, nothing is of a former schema."""

from __future__ import annotations

import re

import pytest

from host.comfy_server import PACK_NAME, ComfyServer
from host.locales import LANGUAGES, LOCALES, english, texts_of, translated, written

NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated(server: ComfyServer, language: str) -> None:
    info, texts = server.object_info(), texts_of(language)
    assert english(info, PACK_NAME) - texts.keys() == set(), (
        "translate in texts.json, then python tests/host/locales.py"
    )
    for name, value in translated(info, PACK_NAME, texts).items():
        assert (LOCALES / language / name).read_text(encoding="utf-8") == written(value), (
            "run python tests/host/locales.py"
        )
    assert (
        server.get("/i18n")[language]["nodeDefs"]["ImagePromptApply"]["display_name"] == texts["Apply Adapter to Model"]
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_keep_what_must_stay(language: str) -> None:
    """Numbers, file names and what is typed are the same in every language."""
    for text, translation in texts_of(language).items():
        assert translation.strip(), text
        assert sorted(NUMBER.findall(text)) == sorted(NUMBER.findall(translation)), text
        for quoted in re.findall(r"'[^']*\d[^']*'", text):
            assert quoted in translation, text
