"""How files of strangers are given to libraries that decode them: FFmpeg on a leash, and its complaints in our words.

Decisions: FFmpeg may read only containers that hold their own content; playlists, which name other files and addresses,
are not among them, and no protocol is open to it. What a decoder raises is no contract, so everything is caught.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from modelport.inputs.fetch import MediaError

if TYPE_CHECKING:
    from av.container import InputContainer

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpeg,mpegts,mpegvideo,m4v,h264,hevc,ivf,obu,ogg,gif,apng,nut,"
    "wav,w64,mp3,aac,flac,aiff,caf,amr,ac3,eac3,au"
)
INSTALL = "pip install 'modelport[media]'"


@contextmanager
def refusing(label: str) -> Iterator[None]:
    """Whatever a decoder says about bytes that it cannot read becomes a `MediaError`."""
    try:
        yield
    except ImportError:
        raise
    except MediaError as error:
        if str(error).startswith(label):
            raise
        raise MediaError(f"{label}: {error}") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(f"{label}: it is broken, or of no kind that can be read: {reason}") from None


def open_container(data: bytes) -> InputContainer:
    """Open a film or a sound with FFmpeg; use it in a `with`.

    :raises ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"films, and sound inside of films, are read with PyAV: {INSTALL}") from error
    return av.open(io.BytesIO(data), options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"})
