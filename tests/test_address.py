"""Addresses: no secret is shown, everything that says which imagery it is, is; and what tells two sources apart."""

from __future__ import annotations

import pytest

from rsosm_cli.address import HIDDEN, display, host_of, identity

TILES = "https://host/{z}/{x}/{y}"


@pytest.mark.parametrize(
    "secret",
    [
        "https://me:tell-nobody@host/{z}/{x}/{y}",
        *(
            f"{TILES}?style=day&{name}=tell-nobody"
            for name in (
                "key", "apikey", "api_key", "apiKey", "token", "access_token", "sig", "signature", "secret", "password",
                "pwd", "auth", "code", "appid", "access", "pass", "subscription-key", "connectId", "tk", "sas",
                "header.Authorization",
                "X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "AWSAccessKeyId", "x%2Damz%2Dsignature",
            )
        ),
        f"{TILES}?style=day;token=tell-nobody",
        f"{TILES}?token=tell-nobody{{MY_KEY}}",
        f"{TILES}?url=https%3A%2F%2Fhost%2Fa.tif%3Ftoken%3Dtell-nobody",
        f"{TILES}?url=/vsicurl/https://me:tell-nobody@host/a.tif",
        "https://host/proxy/https://me:tell-nobody@host/{z}/{x}/{y}",
        f"{TILES}#access_token=tell-nobody",
        "wmts:https://host/wmts?token=tell-nobody#ortho",
        "stac:https://me:tell-nobody@host/v1#sentinel-2-l2a",
        "https://host/wmts/token/tell-nobody-0123456789/1.0.0/{z}/{x}/{y}",
        "http://me:tell-nobody@[::1/{z}/{x}/{y}",
        f"{TILES}?tell-nobody-0123456789",
    ],
)  # fmt: skip
def test_keys_tokens_and_passwords_are_hidden(secret: str) -> None:
    assert "tell-nobody" not in display(secret)
    assert HIDDEN in display(secret)
    assert "tell-nobody" not in host_of(secret)
    assert len(identity(secret)) == 16


@pytest.mark.parametrize(
    "value",
    [
        "5f0c1e7ad2b94c6f8a3e1d0b7c5f9e21",  # hexadecimal, as of TianDiTu
        "an7nvfzojv5wa96dsga5nk8w",
        "AbCdEf0123GhIjKl4567MnOpQr89StUv",
        "9fK2xQ7m-Zp4Lr8Tn1Vb6_Wy3Hc5Jd0Gs==",
        "pk.eyJ1IjoibWUiLCJhIjoiY2t4In0.abcDEF123",
    ],
)
def test_a_value_that_can_only_be_a_secret_is_hidden_whatever_its_name(value: str) -> None:
    assert display(f"{TILES}?v={value}&style=day") == f"{TILES}?v={HIDDEN}&style=day"
    assert display(f"{TILES}?{value}") == f"{TILES}?{HIDDEN}"


@pytest.mark.parametrize(
    "source",
    [
        "photos/a.tif",
        "Esri.WorldImagery",
        "wmts:https://data.geopf.fr/wmts#ORTHOIMAGERY.ORTHOPHOTOS2018",
        "stac:https://host/v1#sentinel-1-global-mosaics-2023",
        "https://tiles.openaerialmap.org/5ac626e091b5310010e0d482/0/5ac626e091b5310010e0d483/{z}/{x}/{y}",
        f"{TILES}?mosaic=planet_medres_visual_2019-12_2020-05_mosaic&key={{MY_KEY}}&id={{x}}",
        f"{TILES}?layer=S2_Cloudless_2019_Mosaic_EPSG3857_Version2&set=OrthoImageryMosaic2019Version",
        f"{TILES}?id=550e8400-e29b-41d4-a716-446655440000&scene=5ac626e091b5310010e0d482&author=me",
        "https://host/render?url=https%3A%2F%2Fhost%2F5ac626e091b5310010e0d482%2Fa.tif",
        "https://host/a.tif?download",
        "https://host/S2A_MSIL2A_20230615T045701_N0509_R119_T45RUL/TCI.tif",
    ],
)
def test_what_says_which_imagery_it_is_is_shown(source: str) -> None:
    assert display(source) == source


def test_every_part_but_a_key_tells_sources_apart() -> None:
    alike = [
        f"{TILES}?api_key=one&style=day",
        f"{TILES}?api_key=two&style=day",
        f"{TILES}?api_key=&style=day",
    ]
    assert len(set(map(identity, alike))) == 1
    assert identity("https://me:one@host/a") == identity("https://me:two@host/a")
    assert identity("https://host/a?X-Amz-Signature=1&X-Amz-Date=1") == identity(
        "https://host/a?X-Amz-Signature=2&X-Amz-Date=2"
    )
    apart = [
        "wmts:https://host/wmts#ORTHOIMAGERY.ORTHOPHOTOS.2018",
        "wmts:https://host/wmts#ORTHOIMAGERY.ORTHOPHOTOS.2019",
        "https://host/5ac626e091b5310010e0d482/{z}/{x}/{y}",
        "https://host/59e62b9a3d6412ef72209d69/{z}/{x}/{y}",
        f"{TILES}?keyword=2018",
        f"{TILES}?keyword=2019",
        f"{TILES}?code=2018",
        f"{TILES}?code=2019",
        f"{TILES}?5f0c1e7ad2b94c6f8a3e1d0b7c5f9e21",
        f"{TILES}?6f0c1e7ad2b94c6f8a3e1d0b7c5f9e21",
        f"{TILES}?v=5f0c1e7ad2b94c6f8a3e1d0b7c5f9e21",
        f"{TILES}?v=6f0c1e7ad2b94c6f8a3e1d0b7c5f9e21",
        "https://host/render?url=https%3A%2F%2Fhost%2Fa.tif%3Fkey%3D1",
        "https://host/render?url=https%3A%2F%2Fhost%2Fb.tif%3Fkey%3D1",
    ]
    assert len(set(map(identity, apart))) == len(apart)
