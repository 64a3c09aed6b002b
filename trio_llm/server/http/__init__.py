"""HTTP itself: connections, the ASGI edge, deadlines, proxies, CORS, uploads and server-sent events."""
