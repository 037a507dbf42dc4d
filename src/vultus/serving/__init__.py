"""The web page and the HTTP API of `vultus serve`. Needs the extra `serve`.

- `app`: routes, OpenAPI document, page; `handlers`: what each route does; `schemas`: requests and responses.
- `errors`, `limits`, `middleware`: JSON errors, load limits, authentication, metrics, response headers.
- `engine`: generation, photos and similarities without HTTP; `batching`: several requests in one generator call;
  `forms`: photos in forms; `payloads`: bytes to embeddings, images to bytes.
- `server`: binding the port and the uvicorn process; `settings`: limits; `logs`: errors without data of requests.

Command line options are in `vultus.cli.serve`. The files of the page are in `vultus/assets/page`.
"""
