"""Whether the service in this container takes tasks and drives them: the exit code tells, and its last words why."""

import os
import sys
import urllib.error
import urllib.request

# The first is that of `tesapi dispatcher`.
port = os.environ.get("TESAPI_DISPATCHER__PORT") or os.environ.get("TESAPI_SERVER__PORT") or "8080"
url = f"http://127.0.0.1:{port}/readyz"
try:
    urllib.request.urlopen(url, timeout=5).close()
except urllib.error.HTTPError as error:
    sys.exit(error.read().decode("utf-8", "replace"))
except OSError as error:
    sys.exit(f"{url}: {error}")
