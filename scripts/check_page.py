"""What scripts/check-page.sh does in the browser: check_page.py CHROMIUM OPEN_SERVER SERVER_WITH_KEY FOLDER."""

import json
import sys
import urllib.request

from playwright.sync_api import sync_playwright

browser_path, open_base, keyed_base, folder = sys.argv[1:]
faults = []

HOSTILE = (
    "<img src=x onerror=\"window.hit = 1\"><script>window.hit = 1</script>\n\n"
    "## A head with `code` and **bold**\n\n```html\n<b onclick=\"window.hit = 1\">x</b>\n```\n[link](javascript:window.hit=1)\n\n~~~\nopen fence"
)


def expect(what, holds):
    print(("ok    " if holds else "FAULT ") + what)
    if not holds:
        faults.append(what)


def watched(page, base):
    """Notes what a page must not do."""
    page.on("pageerror", lambda e: faults.append(f"script: {e}"))
    page.on("dialog", lambda d: (faults.append("a dialog of the browser"), d.dismiss()))

    def console(message):
        # A refusal that the page handles is logged by the browser.
        if message.type == "error" and "status of 401" not in message.text:
            faults.append(f"console: {message.text}")

    page.on("console", console)
    page.on("request", lambda r: None if r.url.startswith((base, "data:")) else faults.append(f"request: {r.url}"))
    return page


def until(page, holds, seconds=60):
    """The page's policy lets nobody compile a string, so that it is asked again and again from here."""
    for _ in range(seconds * 20):
        if page.evaluate(holds):
            return
        page.wait_for_timeout(50)
    raise SystemExit(f"never: {holds}")


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def machine(base):
    return json.load(urllib.request.urlopen(base + "/machine"))


def until_idle(base, seconds=20):
    import time

    for _ in range(seconds * 10):
        if not machine(base)["queue"]["running"]:
            return True
        time.sleep(0.1)
    return False


def ask(page, words, most="200"):
    if not page.locator("#most").is_visible():
        page.locator("#settings summary").click()
    page.locator("#most").fill(most)
    page.locator("#temperature").fill("0.7")
    page.locator("#seed").fill("7")
    page.locator("#system").fill("You are brief.")
    page.locator("#settings summary").click()
    page.locator("#words").fill(words)
    page.locator("#words").press("Enter")


with sync_playwright() as p:
    browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
    views = {
        "wide-light": dict(viewport={"width": 1280, "height": 800}, color_scheme="light"),
        "wide-dark": dict(viewport={"width": 1280, "height": 800}, color_scheme="dark"),
        "narrow-light": dict(viewport={"width": 390, "height": 780}, color_scheme="light"),
        "narrow-dark": dict(viewport={"width": 390, "height": 780}, color_scheme="dark"),
    }
    for name, view in views.items():
        page = watched(browser.new_context(**view).new_page(), open_base)
        page.goto(open_base)
        until(page, "document.getElementById('status').textContent === 'ready'")
        if name.startswith("narrow"):
            page.screenshot(path=f"{folder}/{name}-first.png")
            page.locator("#fold").click()
        ask(page, "Write a Python function that adds two numbers, and explain it.")
        until(page, "document.querySelector('.turn.assistant .text').textContent.length > 40")
        page.wait_for_timeout(2500)
        page.screenshot(path=f"{folder}/{name}.png")
        expect(f"{name}: nothing is wider than the window", overflow(page) <= 0)
        links = page.locator("#links").inner_text()
        expect(f"{name}: storage carries something ({links.split(chr(10))[0]})", "from storage" in links and "\t0.00 GB/s" not in links.split("\n")[0])
        expect(f"{name}: the rate is shown", float(page.locator("#rate").inner_text()) > 0)
        expect(f"{name}: a request is shown", "slot 0" in page.locator("#requests").inner_text())
        page.locator("#stop").click()
        page.wait_for_selector("#send:visible")
        expect(f"{name}: stopped", "stopped" in page.locator(".turn.assistant .foot").last.inner_text())
        expect(f"{name}: the server computes no more", until_idle(open_base))
        page.context.close()

    page = watched(browser.new_context(viewport={"width": 1000, "height": 700}).new_page(), open_base)
    page.goto(open_base)
    # An answer as a model may write it.
    chunks = [{"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"reasoning_content": "<b>hm</b> `x`"}}]}]
    chunks += [{"choices": [{"delta": {"content": HOSTILE[i : i + 7]}}]} for i in range(0, len(HOSTILE), 7)]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 3}}]
    body = "".join(f": ping\n\ndata: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=200, content_type="text/event-stream", body=body))
    ask(page, "<i>me</i>")
    page.wait_for_selector(".foot:has-text('9 tokens')")
    text = page.locator(".turn.assistant .text")
    expect("markup of a model is text", page.evaluate("window.hit === undefined") and text.locator("img, script, b, a").count() == 0)
    expect("code is told apart", text.locator("pre code").all_inner_texts() == ['<b onclick="window.hit = 1">x</b>', "open fence"])
    expect("heads, code and bold", text.locator("h3 code").inner_text() == "code" and text.locator("h3 strong").inner_text() == "bold")
    expect("reasoning is apart", page.locator(".turn details").count() == 1 and page.locator(".turn details b").count() == 0)
    expect("the user's words are text", page.locator(".turn.user .text").inner_text() == "<i>me</i>")
    page.screenshot(path=f"{folder}/markup.png")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=429, content_type="application/json", body=json.dumps({"error": {"message": "<b>busy</b>"}})))
    ask(page, "again")
    page.wait_for_selector(".error:has-text('<b>busy</b>')")
    expect("a refused message can be sent again", page.locator("#words").input_value() == "again")
    expect("a policy is set and inline code would not run", page.evaluate("""() => {
        try {
            const s = document.createElement('script'); s.textContent = 'window.hit = 2'; document.body.append(s);
        } catch { } return window.hit === undefined; }"""))
    # That it was tried is logged.
    faults[:] = [f for f in faults if "Content Security Policy" not in f and "TrustedScript" not in f and "status of 429" not in f]
    page.context.close()

    page = watched(browser.new_context(viewport={"width": 1000, "height": 700}).new_page(), keyed_base)
    page.goto(keyed_base)
    page.wait_for_selector("#door[open]")
    page.locator("#key").fill("wrong")
    page.locator("#key").press("Enter")
    page.wait_for_selector("#wrong:has-text('none of')")
    page.screenshot(path=f"{folder}/key.png")
    page.locator("#key").fill("secret-1")
    page.locator("#key").press("Enter")
    until(page, "document.getElementById('status').textContent === 'ready'")
    stored = page.evaluate("[localStorage.length, sessionStorage.getItem('nt-key'), document.cookie]")
    expect("the key is in this tab alone", stored == [0, "secret-1", ""])
    page.locator("#words").focus()
    ask(page, "Say hello.", "5")
    page.wait_for_selector(".foot:has-text('5 tokens')", timeout=60000)
    order = []
    page.locator("#fresh").focus()
    for _ in range(6):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    expect(f"the keyboard reaches all ({', '.join(order)})", {"log", "words", "send"} <= set(order))
    page.context.close()
    browser.close()

for fault in faults:
    print("FAULT", fault)
sys.exit(1 if faults else 0)
