"use strict";
const $ = id => document.getElementById(id);
const messages = [];  // what is sent: {role, content}; answers as the model wrote them
let model = "", running = null;

const mebibytes = bytes => bytes < 1 << 20 ? (bytes / 1024).toFixed(1) + " KiB" : (bytes / 1048576).toFixed(1) + " MiB";

async function health() {
  try {
    const info = await (await fetch("health")).json();
    model = info.model;
    $("name").textContent = document.title = model;
    $("max_tokens").max = info.max_tokens;
    $("max_tokens").value = Math.min($("max_tokens").value, info.max_tokens);
    const grows = info.token_bytes > 0;
    $("state").textContent = "state " + mebibytes(info.state_bytes + info.window_bytes)
      + (grows ? " + " + mebibytes(info.token_bytes) + " a token" : ", fixed");
    if ($("hint")) $("hint").lastElementChild.hidden = grows;
  } catch { $("state").textContent = "server not reached"; }
}

function make(tag, name, text = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

function show(role, text) {
  $("hint")?.remove();
  const element = make("div", "message " + role, text);
  $("talk").append(element);
  $("talk").scrollTop = $("talk").scrollHeight;
  return element;
}

// Changes what is shown. A reader at the end of the conversation stays there.
function following(change) {
  const talk = $("talk"), down = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  change();
  if (down) talk.scrollTop = talk.scrollHeight;
}

function update() {
  $("send").textContent = running ? "Stop" : "Send";
  $("again").disabled = Boolean(running) || !messages.length;
}

function post(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  return fetch(path, {method: "POST", headers, body: JSON.stringify(body), signal});
}

function body() {
  const start = $("system").value.trim() ? [{role: "system", content: $("system").value}] : [];
  const request = {model, messages: [...start, ...messages], stream: true, stream_options: {include_usage: true}};
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"])
    if ($(name).value !== "") request[name] = Number($(name).value);
  return request;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "";;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

// An answer as it grows: new text at once and as it is, then as Markdown: one rendering at a time, four a second
// at most, and fewer if the server is slow. If one fails, the text stays as it is.
class Growing {
  text = "";
  drawn = "";  // as much of the text as is shown as Markdown
  rich = make("div", "rich");
  tail = make("span", "tail");
  drawing = false;
  failed = false;
  ended = false;
  wake = () => {};

  constructor(element) {
    this.element = element;
    element.setAttribute("aria-busy", "true");
    element.append(this.rich, this.tail);
  }

  add(piece) {
    this.text += piece;
    following(() => this.tail.append(piece));
    this.draw();
  }

  end() {
    this.ended = true;
    this.wake();
    this.draw();
  }

  async draw() {
    if (this.drawing) return;
    this.drawing = true;
    while (this.drawn !== this.text && !this.failed && this.element.isConnected) {
      const began = performance.now(), text = this.text, html = await rendered(text);
      if (html === null) this.fail();
      else this.put(text, html);
      if (!this.ended) await this.pause(Math.max(250, 5 * (performance.now() - began)));
    }
    this.drawing = false;
    if (this.ended) this.element.removeAttribute("aria-busy");
  }

  pause(milliseconds) {
    return new Promise(resolve => {
      this.wake = resolve;
      setTimeout(resolve, milliseconds);
    });
  }

  put(text, html) {
    following(() => {
      this.drawn = text;
      this.tail.textContent = this.text.slice(text.length);
      this.rich.innerHTML = html;  // the server has sanitized it
      for (const code of this.rich.querySelectorAll("pre > code"))
        frame(code.parentElement, "code").prepend(bar(code));
      for (const table of this.rich.querySelectorAll("table")) frame(table, "scroll");
      (text.endsWith("\n") ? this.element : last(this.rich)).append(this.tail);
    });
  }

  fail() {
    this.failed = true;
    this.rich.remove();
    this.tail.textContent = this.text;
    this.element.append(this.tail);
  }
}

// Sanitized HTML of Markdown, or null.
async function rendered(text) {
  try {
    const response = await post("markdown", {text}, AbortSignal.timeout(10_000));
    return response.ok ? (await response.json()).html : null;
  } catch { return null; }
}

function frame(element, name) {
  const box = make("div", name);
  element.replaceWith(box);
  box.append(element);
  return box;
}

// Where text goes on: in the last paragraph, item or cell.
function last(element) {
  const inner = element.lastElementChild;
  return inner?.matches("p, li, ul, ol, blockquote, h1, h2, h3, h4, h5, h6") ? last(inner) : element;
}

function bar(code) {
  const element = make("div", "bar");
  element.append(make("span", "", code.className.replace("language-", "")), copier(code));
  return element;
}

function copier(code) {
  const button = make("button", "", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    button.textContent = await copy(code.textContent.replace(/\n$/, "")) ? "Copied" : "Not copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { return copyOld(text); }  // browsers have a clipboard for https and localhost only
}

function copyOld(text) {
  const area = make("textarea", "away"), focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}

async function answer() {
  const element = show("assistant waiting", ""), growing = new Growing(element);
  running = new AbortController();
  update();
  let first = 0, count = 0;
  try {
    const response = await post("v1/chat/completions", body(), running.signal);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) {
        count = event.usage.completion_tokens;
        $("context").textContent = event.usage.total_tokens.toLocaleString("en") + " tokens in context";
      }
      const piece = event.choices[0]?.delta.content;
      if (piece) {
        first ||= performance.now();
        count += 1;
        growing.add(piece);
      }
      const seconds = (performance.now() - first) / 1000;
      if (first && count > 1) $("speed").textContent = ((count - 1) / seconds).toFixed(1) + " tokens/s";
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  running = null;
  growing.end();
  update();
  if (!element.isConnected) return;  // a new conversation began meanwhile
  element.classList.remove("waiting");
  if (growing.text) messages.push({role: "assistant", content: growing.text});
  else element.remove();
  update();
  $("text").focus();
}

function send() {
  if (running) { running.abort(); return; }
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  grow();
  messages.push({role: "user", content: text});
  show("user", text);
  answer();
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = $("text").scrollHeight + 2 + "px";
}

$("form").addEventListener("submit", event => { event.preventDefault(); send(); });
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) send();
  }
});
$("again").addEventListener("click", () => {
  for (const element of $("talk").querySelectorAll(".error")) element.remove();
  if (messages.at(-1)?.role === "assistant") {
    messages.pop();
    $("talk").lastElementChild.remove();
  }
  answer();
});
$("new").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("talk").replaceChildren();
  $("context").textContent = "0 tokens in context";
  update();
  $("text").focus();
});
$("toggle").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("toggle").setAttribute("aria-expanded", String(!$("settings").hidden));
});
health();
grow();
$("text").focus();
