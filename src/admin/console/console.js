// The console: shows what the API says, and asks it for what an operator wants. It keeps nothing, decides
// nothing, and puts everything that comes from rows, S2 or transforms on the page as text, never as markup.

const REFRESH_MS = 2000;
const PAGE = 100;
const $ = (id) => document.getElementById(id);

/** An element with attributes and children; whatever is not an element becomes text. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const count = (number) => Number(number).toLocaleString("en");
const plural = (number, thing) => `${count(number)} ${thing}${number === 1 ? "" : "s"}`;

function bytes(number) {
  if (number < 1024) return `${number} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let [value, unit] = [number / 1024, 0];
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${value >= 100 ? Math.round(value) : value.toFixed(2)} ${units[unit]}`;
}

function micros(number) {
  if (number < 1000) return `${Math.round(number)} µs`;
  if (number < 1e6) return `${(number / 1000).toFixed(1)} ms`;
  return `${(number / 1e6).toFixed(1)} s`;
}

function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 90) return `${whole} s`;
  if (whole < 5400) return `${Math.round(whole / 60)} min`;
  if (whole < 129600) return `${Math.round(whole / 3600)} h`;
  return `${Math.round(whole / 86400)} d`;
}

/** A moment, told as people do, with the exact one behind it. */
function moment(text) {
  const at = Date.parse(text);
  if (Number.isNaN(at)) return "";
  const away = (at - Date.now()) / 1000;
  return el("time", { datetime: text, title: text }, away > 0 ? `in ${span(away)}` : `${span(-away)} ago`);
}

const BADGES = {
  parked: "bad", retrying: "warn", waiting: "info", delivering: "info",
  live: "", compiling: "info", vetting: "info", rejected: "bad", rolled_back: "bad",
  open: "", opening: "info", idle: "info", shut: "bad",
};
const badge = (word) => el("span", { class: `badge ${BADGES[word] ?? "warn"}` }, word.replace("_", " "));

async function ask(path, body) {
  const options = body === undefined
    ? {}
    : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  const read = await answer.json();
  if (!answer.ok && read.error) throw new Error(read.error.text);
  return read;
}

let toasting = 0;
function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toasting);
  toasting = setTimeout(() => { $("toast").hidden = true; }, 6000);
}

/** Asks before what cannot be taken back. */
function confirmed(title, text, yes) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = yes;
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true });
  });
}

const notice = (kind, code, text) => el("li", { class: kind }, code && el("b", {}, code), text);

function showStatus(status) {
  const stuck = status.stuck.length > 0;
  const [word, kind] = status.ready ? ["delivering", ""] : [stuck ? "stuck" : "not ready", "bad"];
  $("state").textContent = word;
  $("state").className = `badge ${kind}`;
  $("guarantee").textContent = status.guarantee;
  $("place").textContent = [status.endpoint, status.chain && `chain ${status.chain}`].filter(Boolean).join(" · ");
  $("reasons").replaceChildren(...status.reasons.map((reason) => notice("bad", reason.code, reason.text)));
  $("warnings").replaceChildren(...status.warnings.map((text) => notice("warn", "", text)));
  document.title = status.ready ? "Sluicebox" : `(!) Sluicebox`;

  const failed = status.parked + status.retrying;
  const kept = status.wal_kept_bytes;
  const safe = status.wal_safe_bytes;
  const numbers = [
    ["Delivered", count(status.records), `${bytes(status.record_bytes)}, next number ${status.stream_tail ?? "–"}`],
    ["Failed", count(failed), `${count(status.parked)} parked, ${count(status.retrying)} retrying`, failed > 0],
    ["Held behind them", count(status.waiting), "in their groups’ order"],
    ["Dropped", count(status.dropped), "by transforms"],
    ["Postgres keeps", kept === null ? "–" : bytes(kept),
      status.wal_kept_by?.text ?? (safe === null ? "of its log, for the slot" : `${bytes(Math.max(0, safe))} more may be written`),
      status.wal_status === "unreserved" || status.wal_status === "lost"],
    ["Not confirmed", status.lag_bytes === null ? "–" : bytes(status.lag_bytes), "of Postgres’s log"],
    ["Spilled", bytes(status.spilled_bytes), `${plural(status.spilled_changes, "change")} on disk until S2 takes them`, status.spilled_changes > 0],
    ["Store", bytes(status.store_bytes), `of ${bytes(status.store_bytes_max)}`, status.store_bytes >= 0.8 * status.store_bytes_max],
  ];
  $("numbers").replaceChildren(...numbers.map(([name, value, note, alert]) =>
    el("div", { class: alert ? "alert" : null }, el("dt", {}, name), el("dd", {}, value), el("dd", { class: "note" }, note))));

  $("streams-section").hidden = status.streams.length === 0;
  $("streams").replaceChildren(...status.streams.map((stream) => el("tr", {},
    el("td", { class: "mono" }, stream.name),
    el("td", {}, badge(stream.state), stream.reason && el("p", { class: "small" }, stream.reason.text)),
    el("td", { class: "number" }, `${count(stream.queued)}, ${bytes(stream.queued_bytes)}`),
    el("td", { class: "number" }, count(stream.parked)),
    el("td", { class: "number" }, stream.tail ?? "–"))));
}

function showTransforms(list) {
  $("chain").textContent = list.digest ? `generation ${list.generation}, ${list.digest.slice(0, 16)}` : "";
  $("chain-warnings").replaceChildren(...(list.warnings ?? []).map((text) => notice("warn", "", text)));
  const rows = (list.transforms ?? []).map((file) => el("tr", {},
    el("td", {}, el("span", { class: "mono" }, file.file), el("div", { class: "mono quiet" }, file.digest.slice(0, 16))),
    el("td", {}, badge(file.state), file.reason && el("p", { class: "small" }, file.reason)),
    el("td", {}, file.vet_text ?? el("span", { class: "quiet" }, "–")),
    el("td", { class: "number" }, count(file.calls)),
    el("td", { class: "number" }, count(file.errors)),
    el("td", { class: "number" }, file.calls ? micros(file.micros / file.calls) : "–"),
    el("td", { class: "nowrap" }, moment(file.since))));
  if (rows.length === 0) rows.push(el("tr", {}, el("td", { colspan: 7, class: "empty" }, "No transforms: messages go as they are.")));
  $("transforms").replaceChildren(...rows);
  options("transform", (list.transforms ?? []).map((file) => file.file));
}

// --- messages

const form = $("filter");
let shown = { messages: [], total: 0, next: null };
let picked = null;
let pages = 1;
let tables = new Set();
let classes = new Set(["oversize", "refused", "route", "trap", "timeout", "limit", "guest", "invalid", "encode"]);

/** Adds what is new to a list of choices, and leaves what is chosen. */
function options(name, values) {
  const select = form.elements[name];
  const known = new Set([...select.options].map((option) => option.value));
  for (const value of values) {
    if (!known.has(value)) select.append(el("option", { value }, value));
    known.add(value);
  }
}

function filter() {
  const chosen = {};
  for (const name of ["state", "class", "transform", "table"]) {
    const value = form.elements[name].value.trim();
    if (value) chosen[name] = value;
  }
  return chosen;
}

async function list() {
  let messages = [], after = null, last;
  for (let page = 0; page < pages; page += 1) {
    const query = new URLSearchParams({ ...filter(), limit: PAGE, ...(after && { after }) });
    last = await ask(`api/v1/messages?${query}`);
    messages = messages.concat(last.messages);
    after = last.next;
    if (!after) break;
  }
  return { messages, total: last.total, next: last.next };
}

const keyText = (key) => key && typeof key === "object"
  ? Object.entries(key).map(([name, value]) => `${name}=${typeof value === "string" ? value : JSON.stringify(value)}`).join(" ")
  : "no key";

function columns(message, most) {
  const whole = message.bytes ?? message.columns.reduce((sum, column) => sum + column.bytes, 0);
  if (message.columns.length === 0) return el("span", { class: "quiet" }, "–");
  return el("div", { class: "columns" }, message.columns.slice(0, most).map((column) => [
    el("span", { class: "mono" }, column.name),
    el("meter", { min: 0, max: Math.max(whole, 1), low: whole / 4, high: whole / 2, optimum: 0, value: column.bytes, title: `${column.name}: ${bytes(column.bytes)} of ${bytes(whole)}` }),
    el("span", { class: "nowrap small" }, bytes(column.bytes)),
  ]));
}

function why(message) {
  if (message.error) {
    const at = message.error.transform && [" in ", el("span", { class: "mono" }, message.error.transform)];
    return [el("b", {}, message.error.class), at ?? "", el("div", { class: "small few-lines", title: message.error.text }, message.error.text)];
  }
  return message.behind ? `behind message ${message.behind}` : "";
}

function actions(message) {
  const stop = (work) => (event) => { event.stopPropagation(); work(); };
  const failed = message.state === "parked" || message.state === "retrying";
  return [
    el("button", { type: "button", disabled: !failed, onclick: stop(() => retry(message.id)) }, "Retry"),
    el("button", { type: "button", class: "danger", disabled: message.state === "delivering", onclick: stop(() => acknowledge(message.id)) }, "Acknowledge"),
  ];
}

function showMessages() {
  for (const message of shown.messages) {
    tables.add(message.table);
    if (message.error) classes.add(message.error.class);
  }
  options("class", classes);
  $("tables").replaceChildren(...[...tables].map((value) => el("option", { value })));
  const rows = shown.messages.map((message) => el("tr", {
    class: message.id === picked ? "pick picked" : "pick",
    onclick: () => pick(message.id),
  },
    el("td", { class: "nowrap" }, el("button", { type: "button", class: "mono", "aria-label": `Show message ${message.id}` }, message.id), " ", badge(message.state)),
    el("td", { class: "wide" }, message.table, el("div", { class: "mono quiet few-lines" }, `${message.action} ${keyText(message.key)}`)),
    el("td", { class: "wide" }, why(message)),
    el("td", { class: "number" }, message.bytes === null ? "–" : bytes(message.bytes), message.bytes === null ? "" : el("div", { class: "quiet small" }, `limit ${bytes(message.bytes_max)}`)),
    el("td", {}, columns(message, 3)),
    el("td", { class: "number" }, count(message.attempts), message.next_attempt_at ? el("div", { class: "quiet small" }, "next ", moment(message.next_attempt_at)) : ""),
    el("td", { class: "actions" }, actions(message))));
  if (rows.length === 0) {
    const all = Object.keys(filter()).length === 0;
    const text = all ? "The store is empty: everything was delivered." : "No message fits the filter.";
    rows.push(el("tr", {}, el("td", { colspan: 7, class: "empty" }, text)));
  }
  // A button that has the focus keeps it.
  const focus = document.activeElement?.closest?.("#messages") ? document.activeElement.getAttribute("aria-label") : null;
  $("messages").replaceChildren(...rows);
  if (focus) document.querySelector(`#messages [aria-label="${CSS.escape(focus)}"]`)?.focus();
  const some = shown.messages.length < shown.total ? `${count(shown.messages.length)} of ` : "";
  $("messages-end").textContent = shown.total ? `${some}${plural(shown.total, "message")}` : "";
  $("more").hidden = !shown.next;
  $("retry-all").disabled = $("ack-all").disabled = shown.total === 0;
}

async function act(work) {
  try {
    toast(await work());
  } catch (error) {
    toast(error.message);
  }
  await refresh();
}

const retry = (id) => act(async () => {
  await ask(`api/v1/messages/${id}/retry`, {});
  return `Message ${id} is tried again.`;
});

async function acknowledge(id) {
  const text = "It is given up: it leaves the store and is never delivered. What waits behind it follows.";
  if (!await confirmed(`Acknowledge message ${id}?`, text, "Acknowledge")) return;
  await act(async () => {
    const { unchanged_behind } = await ask(`api/v1/messages/${id}/ack`, {});
    if (picked === id) close();
    return given(`Message ${id} is given up.`, unchanged_behind);
  });
}

const given = (text, behind) => behind
  ? `${text} ${plural(behind, "waiting update")} behind refer to large columns that only the acknowledged messages held: consumers keep the older values of those.`
  : text;

const many = () => ({ all: true, ...filter() });
const words = () => {
  const chosen = Object.entries(filter()).map(([name, value]) => `${name} ${value}`);
  return chosen.length ? ` that the filter shows (${chosen.join(", ")})` : " in the store";
};

$("retry-all").addEventListener("click", () => act(async () => {
  const { changed } = await ask("api/v1/messages/retry", many());
  return `${plural(changed, "message")} tried again.`;
}));
$("ack-all").addEventListener("click", async () => {
  const body = many();
  const text = `All messages${words()} are given up: they leave the store and are never delivered. At this moment these are ${count(shown.total)}.`;
  if (!await confirmed("Acknowledge them all?", text, `Acknowledge ${count(shown.total)}`)) return;
  await act(async () => {
    const { changed, unchanged_behind } = await ask("api/v1/messages/ack", body);
    return given(`${plural(changed, "message")} given up.`, unchanged_behind);
  });
});
$("more").addEventListener("click", () => { pages += 1; refresh(); });

// --- one message

function close() {
  picked = null;
  $("detail").hidden = true;
  toAddress();
  showMessages();
}

function pair(name, ...value) {
  return [el("dt", {}, name), el("dd", {}, ...value)];
}

function step(trace) {
  const size = trace.bytes === null ? "" : `, ${bytes(trace.bytes)} after it`;
  return el("div", { class: "step" },
    el("span", { class: "mono" }, trace.transform), " ", el("b", {}, trace.verdict),
    el("div", { class: "quiet small" }, `${micros(trace.micros)}${size}, ${trace.digest.slice(0, 16)}`),
    trace.logs.length ? el("pre", {}, trace.logs.join("\n")) : null,
    trace.backtrace.length ? el("pre", {}, trace.backtrace.join("\n")) : null);
}

async function values(id, place) {
  try {
    const { payload, payload_cut } = await ask(`api/v1/messages/${id}`);
    let text = payload;
    try { text = JSON.stringify(JSON.parse(payload), null, 2); } catch { /* Cut, or no JSON: as it is. */ }
    place.replaceChildren(el("pre", {}, text), payload_cut ? el("p", { class: "quiet small" }, "Its beginning; the rest is left out.") : "");
  } catch (error) {
    toast(error.message);
  }
}

async function pick(id) {
  let message;
  try {
    message = await ask(`api/v1/messages/${id}?payload=false`);
  } catch (error) {
    toast(error.message);
    return;
  }
  picked = id;
  const place = el("div", {}, el("button", { type: "button", onclick: () => values(id, place) }, "Show the row’s values"));
  const { error } = message;
  const shut = el("button", { type: "button", onclick: close }, "Close");
  $("detail").replaceChildren(
    el("div", { class: "bar" }, el("h2", {}, `Message ${id}`), badge(message.state), el("span", { class: "spring" }), actions(message), shut),
    message.hint ? el("p", { class: "hint" }, el("b", {}, "What to do: "), message.hint) : "",
    el("dl", {},
      pair("Table", message.table),
      pair("Key", el("span", { class: "mono" }, keyText(message.key))),
      pair("Action", `${message.action}, position ${message.commit_lsn}:${message.commit_idx}`),
      error ? pair("Error", el("b", {}, error.class), ` ${error.text}`) : [],
      error?.transform ? pair("Transform", el("span", { class: "mono" }, error.transform)) : [],
      error && (error.status !== null || error.body) ? pair("S2 answered", `${error.status ?? ""} ${error.body ?? ""}`) : [],
      message.bytes === null ? [] : pair("Size", `${count(message.bytes)} bytes, and S2 takes ${count(message.bytes_max)}`),
      pair("Attempts", count(message.attempts), message.next_attempt_at ? [", next ", moment(message.next_attempt_at)] : ""),
      pair("In the store", moment(message.stored_at)),
      message.behind ? pair("Behind", el("button", { type: "button", onclick: () => pick(message.behind) }, `message ${message.behind}`)) : [],
      message.holds ? pair("Holds back", plural(message.holds, "message")) : []),
    message.columns.length ? el("h3", {}, "Largest columns") : "", message.columns.length ? columns(message, 10) : "",
    message.trace.length ? el("h3", {}, "What each transform did") : "", message.trace.map(step),
    el("h3", {}, "Message before any transform"), place);
  $("detail").hidden = false;
  shut.focus();
  toAddress();
  showMessages();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && picked !== null && !$("confirm").open) close();
});

// --- the page as a whole

let running = false, again = false;
async function refresh() {
  if (running) { again = true; return; }
  running = true;
  try {
    const [status, transforms, messages] = await Promise.all([ask("api/v1/status"), ask("api/v1/transforms"), list().catch((error) => error)]);
    showStatus(status);
    showTransforms(transforms);
    if (messages instanceof Error) {
      $("messages").replaceChildren(el("tr", {}, el("td", { colspan: 7, class: "empty" }, messages.message)));
      $("messages-end").textContent = "";
    } else {
      shown = messages;
      showMessages();
    }
  } catch {
    $("state").textContent = "not reachable";
    $("state").className = "badge bad";
    $("reasons").replaceChildren(notice("bad", "", "Sluicebox does not answer: it has stopped, or is out of reach. What is below is from before."));
    document.title = "(!) Sluicebox";
  }
  running = false;
  if (again) { again = false; refresh(); }
}

/** The filter and the message are in the address, so that they can be kept and passed on. */
function toAddress() {
  const chosen = { state: "", ...filter(), ...(picked && { id: picked }) };
  history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
}

function fromAddress() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (name === "id" && /^[0-9]+$/.test(value) && value !== picked) pick(value);
    if (!["state", "class", "transform", "table"].includes(name)) continue;
    if (name !== "state" && name !== "table" && value) options(name, [value]);
    form.elements[name].value = value;
  }
}

function filtered() {
  pages = 1;
  toAddress();
  refresh();
}
options("class", classes);
fromAddress();
form.addEventListener("change", filtered);
form.addEventListener("submit", (event) => { event.preventDefault(); filtered(); });
addEventListener("hashchange", () => { fromAddress(); pages = 1; refresh(); });
setInterval(() => { if (!document.hidden) refresh(); }, REFRESH_MS);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
