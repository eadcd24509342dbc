"""Tell people and programs how a retraining ended, at least once.

AEGAN_WEBHOOK takes JSON, signed with HMAC-SHA256 by the key in AEGAN_WEBHOOK_SECRET; AEGAN_NOTIFY
holds addresses of mail, chats and telephones as Apprise writes them. None is ever written down.
"""

import hashlib
import hmac
import json
import logging
import os
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from pipelines.base.errors import UserError
from pipelines.ingest.source_address import without_secrets

ADDRESS, SECRET = "AEGAN_WEBHOOK", "AEGAN_WEBHOOK_SECRET"
PEOPLE = "AEGAN_NOTIFY"
SIGNATURE = "X-Aegan-Signature"
TRIES, TIMEOUT_SECONDS = 3, 10
LOOPBACK = ("127.0.0.1", "::1", "localhost")

log = logging.getLogger(__name__)


def check() -> None:
    """UserError for an address that nothing can be sent to, before anything is done."""
    _address()
    _people()


def send(message: dict[str, Any]) -> bool:
    """Whether all have taken it; an `id` says which it is when it comes twice."""
    return all([_post(message), _notify(message)])


def _address() -> str:
    """Where JSON goes, "" for nowhere; UserError for an address that is not encrypted."""
    url = os.environ.get(ADDRESS, "")
    parts = urlsplit(url)
    if url and parts.scheme != "https" and parts.hostname not in LOOPBACK:
        raise UserError(f"{ADDRESS} is no https:// address: set it to one, or leave it unset")
    return url


def _people() -> Any:
    """Apprise, which knows how to reach them; None for nobody."""
    addresses = os.environ.get(PEOPLE, "").split()
    if not addresses:
        return None
    try:
        from apprise import Apprise
    except ModuleNotFoundError:
        raise UserError(f"{PEOPLE} needs apprise: `.venv/bin/pip install apprise`") from None
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # its lines may name an address
    people = Apprise()
    for number, one in enumerate(addresses, start=1):
        if not people.add(one):
            raise UserError(
                f"{PEOPLE}: address {number} of {len(addresses)} is none that Apprise knows: "
                "expected them with spaces between (docs/retraining.md)"
            )
    return people


def _notify(message: dict[str, Any]) -> bool:
    people = _people()
    if people is None:
        return True
    title = f"Retraining {message['retraining']}: {message['outcome']}"
    champion = f"The champion is version {message['champion'] or 'none'}."
    told = bool(people.notify(title=title, body="\n".join([*message["reasons"], champion])))
    if not told:
        log.warning("%s: not all addresses take messages: they are told next time", PEOPLE)
    return told


def _post(message: dict[str, Any]) -> bool:
    url, content = _address(), json.dumps(message).encode()
    if not url:
        return True
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(SECRET):
        digest = hmac.new(secret.encode(), content, hashlib.sha256).hexdigest()
        headers[SIGNATURE] = f"sha256={digest}"
    again = Retry(
        TRIES - 1,
        backoff_factor=0.5,
        status_forcelist=[429, 502, 503, 504],
        allowed_methods=None,
        respect_retry_after_header=False,  # nobody waits for hours: it is told next time
    )
    with requests.Session() as session:
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=again))
        try:
            answer = session.post(
                url, data=content, headers=headers, timeout=TIMEOUT_SECONDS, allow_redirects=False
            )
            taken = 200 <= answer.status_code < 300  # what redirects has not taken it
            reason = "" if taken else f"{answer.status_code}"
        except requests.RequestException as error:
            reason = type(error).__name__
    if reason:
        log.warning(
            "%s does not take messages (%s): it is told next time", without_secrets(url), reason
        )
    return not reason
