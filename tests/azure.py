"""Azurite, Azure's own emulator, on loopback and in memory.

with AzureStore() as store:
    store.make("container")
    subprocess.run(..., env={**os.environ, **store.environment})
"""

import base64
import hashlib
import hmac
import re
import shutil
import subprocess
import tempfile
from email.utils import formatdate
from pathlib import Path
from urllib.request import Request, urlopen

ACCOUNT = "devstoreaccount1"
# The emulator's, which everybody knows.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION = "2021-08-06"


def azurite():
    """Its program, where it is installed: beside Python's, or in PATH."""
    here = Path(__file__).parent.parent / ".venv" / "node_modules" / ".bin" / "azurite-blob"
    return str(here) if here.exists() else shutil.which("azurite-blob")


class AzureStore:
    """The emulator; `endpoint` is that of its account."""

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory()
        command = [
            azurite(), "--blobHost", "127.0.0.1", "--blobPort", "0", "--silent",
            "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            cwd=self._folder.name,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in self._process.stdout:
            if found := re.search(r"listens on (http://\S+)", line):
                self.endpoint = found[1]
                return self
        raise RuntimeError("azurite did not start")

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    @property
    def environment(self):
        return environment(self.endpoint)

    def make(self, container):
        """Make a container."""
        date = formatdate(usegmt=True)
        place = f"/{ACCOUNT}/{container}"
        signed = "\n".join(
            ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{VERSION}",
             f"/{ACCOUNT}{place}", "restype:container"]
        )  # fmt: skip
        code = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
        key = f"SharedKey {ACCOUNT}:{base64.b64encode(code).decode()}"
        headers = {"x-ms-date": date, "x-ms-version": VERSION, "Authorization": key}
        address = f"{self.endpoint}{place}?restype=container"
        urlopen(Request(address, method="PUT", headers=headers)).close()


def environment(endpoint):
    """How to reach it, here or behind a proxy."""
    return {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"{endpoint}/{ACCOUNT}"}  # fmt: skip
