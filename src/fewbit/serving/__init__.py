"""An HTTP server for one model, with OpenAI's interface. fastapi and uvicorn, an extra, are imported only here."""
