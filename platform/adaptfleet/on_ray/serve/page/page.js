"use strict";
// The key lives in this variable alone: it is sent to this endpoint and stored nowhere.
let key = "";
const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function failure(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the endpoint answered ${reply.status}`;
  }
}

function fill(table, rows) {
  const body = $(table).tBodies[0];
  const numeric = [...$(table).tHead.rows[0].cells].map((cell) => cell.className === "n");
  body.replaceChildren(
    ...rows.map((cells) => {
      const row = document.createElement("tr");
      cells.forEach((text, i) => {
        const cell = row.insertCell();
        cell.textContent = numeric[i] ? number.format(text) : text;
        if (numeric[i]) cell.className = "n";
      });
      return row;
    })
  );
}

function tiles(bases) {
  $("tiles").replaceChildren(
    ...bases.flatMap((base) => Object.entries(base.engine).map(([name, value]) => [bases.length > 1 ? `${base.base}: ${name}` : name, value])).map(([name, value]) => {
      const tile = document.createElement("div");
      tile.className = "tile";
      const big = document.createElement("b");
      big.textContent = typeof value === "number" ? number.format(value) : value;
      const small = document.createElement("span");
      small.textContent = name;
      tile.append(big, small);
      return tile;
    })
  );
}

async function health() {
  let ok = false;
  try {
    ok = (await fetch("healthz")).ok;
  } catch {
    // no answer: shown as down
  }
  $("health").textContent = ok ? "healthy" : "down";
  $("health").className = `pill ${ok ? "ok" : "bad"}`;
}

async function refresh() {
  const reply = await fetch("status", { headers: headers() });
  if (!reply.ok) {
    $("said").textContent = await failure(reply);
    document.querySelector("main").hidden = true;
    return false;
  }
  const status = await reply.json();
  $("said").textContent = "";
  document.querySelector("main").hidden = false;
  tiles(status.bases);
  fill("models", status.models.map((m) => [m.id, m.kind, m.traffic, m.requests, m.errors, m.output_tokens]));
  fill("tenants", status.tenants.map((t) => [t.tenant, t.priority, t.in_flight, t.requests_today, t.tokens_today, t.tokens_this_month, t.limits]));
  const chosen = $("model").value;
  $("model").replaceChildren(...status.models.map((m) => new Option(m.id, m.id, false, m.id === chosen)));
  return true;
}

async function ask(event) {
  event.preventDefault();
  const answer = $("answer");
  answer.textContent = "";
  const body = { model: $("model").value, messages: [{ role: "user", content: $("prompt").value }], max_tokens: 200, stream: true };
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { ...headers(), "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (!reply.ok) throw new Error(await failure(reply));
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      rest += value;
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        answer.textContent += event.choices?.[0]?.delta?.content ?? "";
      }
    }
    answer.dataset.done = "true";
  } catch (error) {
    answer.textContent += `\n${error.message}`;
    answer.dataset.done = "failed";
  }
  refresh();
}

$("signin").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  refresh();
});
$("try").addEventListener("submit", ask);
health();
refresh().then(() => ($("said").textContent = ""));
setInterval(health, 5000);
setInterval(() => document.querySelector("main").hidden || refresh(), 2000);
