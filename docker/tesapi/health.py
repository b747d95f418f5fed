"""Whether the service in this container takes tasks and drives them: the exit code tells, and its last words why."""

import os
import sys
import urllib.error
import urllib.request

url = f"http://127.0.0.1:{os.environ.get('TESAPI_SERVER__PORT', '8080')}/readyz"
try:
    urllib.request.urlopen(url, timeout=5).close()
except urllib.error.HTTPError as error:
    sys.exit(error.read().decode("utf-8", "replace"))
except OSError as error:
    sys.exit(f"{url}: {error}")
