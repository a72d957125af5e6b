"""The HTTP server: OpenAI's API on the engine's service, and the web page. `app.ROUTES` is the table of endpoints."""
