# SPDX-License-Identifier: Apache-2.0
"""The page over HTTP: a Starlette application that serves the given slides and its own four files, nothing else.

Slides are asked for by number and tiles by three numbers, so no request names a file.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from modeling_dre_slcl.slide_info import SlideError

from .slide_viewer import SlideViewer

try:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError("The viewer needs Starlette and uvicorn: pip install 'dre-slcl[viewer]'") from error

_PAGE_FILES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "zoom.js": "text/javascript",
    "panel.js": "text/javascript",
}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = {
    # Whatever a name of a slide or a text holds, nothing is run or loaded that is not the page's own.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_KEPT = {"Cache-Control": "private, max-age=3600"}
_FRESH = {"Cache-Control": "no-store"}
_THUMBNAIL_PX = 240


def make_app(viewer: SlideViewer, *, allowed_hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """Builds the application.

    Args:
        viewer (`SlideViewer`): the slides; closed when the application stops.
        allowed_hosts (`tuple` of `str`, *optional*): host names that requests may carry. Names of this machine only,
            unless the page is served to others: so no other web page can reach it through a name of its own.

    Returns:
        `Starlette`: to be run by uvicorn.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        viewer.close()

    endpoints = _Endpoints(viewer)
    routes = [
        Route("/", _guarded(endpoints.page)),
        Route("/page/{name}", _guarded(endpoints.page)),
        Route("/api/slides", _guarded(endpoints.slides)),
        Route("/api/slides/{number:int}/tiles/{level:int}/{column:int}/{row:int}.jpg", _guarded(endpoints.tile)),
        Route("/api/slides/{number:int}/thumbnail.jpg", _guarded(endpoints.thumbnail)),
        Route("/api/slides/{number:int}/state", _guarded(endpoints.state)),
        Route("/api/slides/{number:int}/features", _guarded(endpoints.features)),
        Route("/api/slides/{number:int}/match", _guarded(endpoints.match)),
        Route("/api/slides/{number:int}/nearest", _guarded(endpoints.nearest)),
    ]
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts)),
        Middleware(GZipMiddleware, minimum_size=2048),
    ]
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan)


def _guarded(endpoint: Callable) -> Callable:
    """Turns what a request can get wrong into an answer of one line."""

    async def answer(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except IndexError:
            response = JSONResponse({"error": "There is no such slide or tile."}, status_code=404)
        except SlideError as error:  # its message names files of this machine
            response = JSONResponse({"error": f"{error.slide_id}: {error.reason}"}, status_code=422)
        except ValueError as error:
            response = JSONResponse({"error": str(error)}, status_code=400)
        response.headers.update(_HEADERS)
        return response

    return answer


class _Endpoints:
    """One method for each route."""

    def __init__(self, viewer: SlideViewer) -> None:
        self.viewer = viewer
        folder = resources.files(__package__) / "page"
        self._files = {name: (folder / name).read_bytes() for name in _PAGE_FILES}

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            raise IndexError(name)
        return Response(self._files[name], media_type=_PAGE_FILES[name], headers=_FRESH)

    async def slides(self, _: Request) -> Response:
        return JSONResponse(self.viewer.describe(), headers=_FRESH)

    async def tile(self, request: Request) -> Response:
        place = [request.path_params[name] for name in ("level", "column", "row")]
        jpeg = await self.viewer.read(self._slide(request).pyramid.tile_jpeg, *place)
        return Response(jpeg, media_type="image/jpeg", headers=_KEPT)

    async def thumbnail(self, request: Request) -> Response:
        jpeg = await self.viewer.read(self._slide(request).pyramid.thumbnail_jpeg, _THUMBNAIL_PX)
        return Response(jpeg, media_type="image/jpeg", headers=_KEPT)

    async def state(self, request: Request) -> Response:
        self._slide(request)
        return JSONResponse(self.viewer.tiles_state(request.path_params["number"]), headers=_FRESH)

    async def features(self, request: Request) -> Response:
        return await self._compute(request, self.viewer.tile_table)

    async def match(self, request: Request) -> Response:
        query = request.query_params
        texts = query.get("text", ""), query.get("against", ""), query.get("mode", "contribution")
        return await self._compute(request, self.viewer.match, *texts)

    async def nearest(self, request: Request) -> Response:
        return await self._compute(request, self.viewer.nearest_slides)

    def _slide(self, request: Request) -> Any:
        return self.viewer.slides[request.path_params["number"]]

    async def _compute(self, request: Request, function: Callable, *arguments: Any) -> Response:
        if self.viewer.matches is None:
            raise ValueError("No model was given; start the viewer with --model.")
        if self._slide(request).state == "failed":
            raise ValueError(self._slide(request).message)
        found = await self.viewer.compute(function, request.path_params["number"], *arguments)
        return JSONResponse(found, headers=_FRESH)
