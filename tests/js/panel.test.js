"use strict";
// The last run, the token map and the keyboard.
const {Element} = require("./dom.js");
const {test, assert, PAGE} = require("./page.js");

const opened = async (page) => {
    page.load();
    page.open();
    await page.wait(1000);
    page.asked.length = 0;
};

// The last run

// The host's buttons while it generates, and the id of the request
const begin = async (page, {task = "task(1)", tab = "txt2img"} = {}) => {
    page.context.localStorage.setItem(`${tab}_task_id`, task);
    page.document.querySelector(`#${tab}_interrupt`).style.display = "block";
    await page.wait(1000);
};
const end = async (page, tab = "txt2img") => {
    page.context.localStorage.removeItem(`${tab}_task_id`);
    for (const name of ["interrupt", "interrupting"]) page.document.querySelector(`#${tab}_${name}`).style.display = "none";
    await page.wait(1000);
};
const generate = async (page, which) => {
    await begin(page, which);
    await end(page, which?.tab);
};

// A server that knows these runs by their task
const ran = (page, runs) => {
    page.server["GET status"] = (query) => (
        runs[decodeURIComponent(query.replace("task=", ""))] ?? {run: 0, at: 0, state: "", lines: []}
    );
};

const run = (text, state = "acts") => ({run: 1, at: 45240, state, lines: [{text, hint: "", state}]});
const READY = {agent_attention_status_line: true, agent_attention_preset: "as saved"};

test("the last run is told after each generation, with its time and its mark", async (page) => {
    page.context.opts = READY;
    ran(page, {"task(1)": run("First pass: done"), "task(2)": run("Not applied: x", "wrong")});
    page.load();
    await generate(page);
    assert.equal(page.text("status"), "Last run, 12:34: First pass: done");
    assert.ok(page.find("status", ".agent-attention-acts"));
    assert.equal(page.text("status", "img2img"), "", "it was not made there");
    await generate(page, {task: "task(2)"});
    assert.equal(page.text("status"), "Last run, 12:34: Not applied: x");
    assert.ok(page.find("status", ".agent-attention-wrong"));
    assert.ok(page.find("status").classList.contains("agent-attention-alert"), "goes to the top");
    ran(page, {"task(1)": {...run("First."), lines: [{text: "First.", hint: "", state: "acts"},
        {text: "Hires.", hint: "HyperTile is on.", state: "nothing"}]}});
    await generate(page);
    assert.ok(!page.find("status").classList.contains("agent-attention-alert"));
    assert.equal(page.find("status", ".agent-attention-nothing").textContent, "Hires. HyperTile is on.");
    assert.equal(page.count("GET status"), 3);
    page.context.opts = {...READY, agent_attention_status_line: false};
    await generate(page);
    assert.equal(page.text("status"), "", "it can be left out");
});

test("after Interrupt, whose button is swapped for another, the last run is told when the host has ended", async (page) => {
    page.context.opts = READY;
    page.load();
    await begin(page);
    page.document.querySelector("#txt2img_interrupt").style.display = "none";
    page.document.querySelector("#txt2img_interrupting").style.display = "block";
    await page.wait(2000);
    assert.equal(page.count("GET status"), 0, "the host is still at it");
    await end(page);
    assert.equal(page.text("status"), "Last run, 12:34: First pass: done");
});

test("a page that is loaded again tells its own last run, and no other", async (page) => {
    page.context.opts = READY;
    ran(page, {"task(7)": run("Mine"), "": run("Of somebody else")});
    page.load();
    await page.wait(2000);
    assert.equal(page.text("status"), "", "nothing was made here yet");
    page.session.setItem("agent_attention_task_img2img", "task(7)");
    page.load();
    await page.wait(2000);
    assert.equal(page.text("status", "img2img"), "Last run, 12:34: Mine");
    assert.equal(page.text("status"), "");
});

// Have the page a control `tune` that shows `value`, as after a press of the button.
const ordered = (page, value) => {
    page.server["GET page"] = {...PAGE, rows: [...PAGE.rows, {name: "tune", kind: "slider", choices: []}]};
    const input = new Element("input", {type: "number", value: String(value)});
    page.find("more").append(new Element("div", {id: "txt2img_agent_attention_tune"}, input));
    page.find("tuner").append(new Element("button", {id: "txt2img_agent_attention_tune_done"}));
};
const done = (page) => page.pressed.filter((id) => id.endsWith("tune_done")).length;

test("after tuning, what was found is shown and its preset chosen, if there is one", async (page) => {
    page.context.opts = READY;
    ordered(page, 0);
    page.load();
    page.open();
    await page.wait(1000);
    await generate(page);
    assert.equal(done(page), 0, "nothing was ordered");
    for (const [preset, shown] of [["", "Fast"], ["Paper", "Paper"]]) {
        page.type("tune", "0.02");
        page.server["GET status"] = {...run("Tuned", preset ? "acts" : "wrong"), preset};
        await page.wait(1000);
        await generate(page, {task: `task(${preset})`});
        await page.wait(2000);
        assert.equal(page.find("preset", "input").value, shown);
    }
    assert.equal(done(page), 2);
    assert.equal(page.find("ratio", "input").value, 0.4);
});

test("the token map is asked for with the page's own request", async (page) => {
    page.context.opts = READY;
    page.load();
    assert.deepEqual([...page.readout.ofTask("txt2img", ["", 2, 3, "an image"])], ["", 2, 3]);
    await generate(page, {task: "task(9)"});
    assert.deepEqual([...page.readout.ofTask("txt2img", ["", 2, 3])], ["task(9)", 2, 3]);
});

test("where storage is forbidden the panel works all the same", async (page) => {
    page.context.opts = READY;
    for (const name of ["localStorage", "sessionStorage"]) {
        Object.defineProperty(page.context, name, {get: () => { throw new Error("forbidden"); }});
    }
    page.load();
    page.document.querySelector("#txt2img_interrupt").style.display = "block";
    await page.wait(1000);
    page.document.querySelector("#txt2img_interrupt").style.display = "none";
    await page.wait(1000);
    assert.equal(page.text("status"), "Last run, 12:34: First pass: done");
});

test("a run keeps its page's id, whatever another page puts into the browser's storage meanwhile", async (page) => {
    page.context.opts = READY;
    ran(page, {"task(1)": run("Mine"), "task(2)": run("Of the other page")});
    page.load();
    await begin(page);
    page.context.localStorage.setItem("txt2img_task_id", "task(2)");
    await page.wait(2000);
    await end(page);
    assert.equal(page.text("status"), "Last run, 12:34: Mine");
});

test("the map of a new image comes by itself where it was asked for and is to be seen", async (page) => {
    const shown = () => page.pressed.filter((id) => id.endsWith("_map_show")).length;
    await opened(page);
    await generate(page);
    assert.equal(shown(), 0);
    page.type("record", true);
    await generate(page);
    assert.equal(shown(), 1);
    page.find("map_show").concealed = true;
    await generate(page);
    assert.equal(shown(), 1);
});

// The keyboard

test("what is folded opens by Enter and Space", async (page) => {
    page.find("map", "> .label-wrap").tagName = "BUTTON";
    await opened(page);
    const label = page.find("more", "> .label-wrap");
    assert.equal(label.tabIndex, 0);
    assert.equal(page.find("map", "> .label-wrap").getAttribute("role"), null, "a button already");
    assert.equal(label.getAttribute("role"), "button");
    assert.equal(label.getAttribute("aria-expanded"), "false");
    label.addEventListener("click", () => { label.className = "label-wrap open"; });
    const press = (key) => {
        const event = {type: "keydown", key, preventDefault: () => { event.prevented = true; }};
        label.dispatchEvent(event);
        return event.prevented;
    };
    assert.equal(press("a"), undefined);
    assert.equal(label.className, "label-wrap");
    assert.equal(press("Enter"), true);
    await page.wait(500);
    assert.equal(label.getAttribute("aria-expanded"), "true");
    assert.equal(press(" "), true);
});

