"use strict";
// What the panel asks the server, when, and what it shows.
const {Element} = require("./dom.js");
const {test, assert} = require("./page.js");

const UNREACHABLE = "The preview is not available: the server does not answer.";

const opened = async (page, tab = "txt2img") => {
    page.load();
    page.open(tab);
    await page.wait(1000);
};

test("everything the server needs is sent", async (page) => {
    await opened(page);
    const values = {enabled: false, ratio: 0, fp32: false, method: "agent", min_tokens: 0, rules: ""};
    const host = {width: 512, height: 512, denoising: 0.7, sampler: "", scheduler: ""};
    assert.deepEqual(page.previews, [{tab: "txt2img", values, ...host, hires: null, overrides: []}]);
});

test("the answer is shown, each line with its mark, and names controls as they are shown", async (page) => {
    page.context.getTranslation = (text) => ({From: "Ab"})[text];
    const hint = "Agents begin at 0.7. Change “From” or “Until”.";
    const lines = [{text: "Much.", hint: "Beware."}, {text: "Nothing.", hint, state: "nothing"}, {text: "", hint: "Less."}];
    page.server["POST preview"] = {lines, preset: "Fast"};
    await opened(page);
    const hints = page.find("summary").querySelectorAll(".agent-attention-hint").map((one) => one.textContent);
    assert.deepEqual(hints, ["Beware.", "Agents begin at 0.7. Change “Ab” or “Until”.", "Less."]);
    assert.equal(page.find("summary", ".agent-attention-nothing").textContent, `Nothing. ${hints[1]}`);
    assert.equal(page.find("summary", ".prose").getAttribute("role"), "status");
    const before = page.asked.length;
    await page.wait(60000);
    assert.equal(page.asked.length, before, "nothing is asked while nothing changes");
});

test("every kind of control is read", async (page) => {
    await opened(page);
    page.type("ratio", "0.5");
    page.type("fp32", true);
    page.type("method", "pool");
    page.type("min_tokens", "64");
    page.type("rules", "downsample=2 full");
    await page.wait(500);
    const {enabled, ...values} = page.previews.at(-1).values;
    assert.deepEqual(values, {ratio: 0.5, fp32: true, method: "pool", min_tokens: 64, rules: "downsample=2 full"});
});

test("a number out of its range goes to the server, which says what is wrong", async (page) => {
    await opened(page);
    page.server["POST preview"] = {status: 422, content: {detail: "ratio must be a number from 0 to 0.95, got 7.0"}};
    page.type("ratio", "7");
    await page.wait(20000);
    assert.equal(page.previews.at(-1).values.ratio, 7);
    assert.equal(page.find("summary", ".agent-attention-wrong").textContent, "ratio must be a number from 0 to 0.95, got 7.0");
    assert.equal(page.count("POST preview"), 2, "a refusal is an answer, and not asked for again");
});

test("half a number or half a choice leaves the value as it was", async (page) => {
    await opened(page);
    page.type("ratio", "0.5");
    await page.wait(500);
    page.find("ratio", "input").validity.badInput = true;
    page.type("ratio", "");
    page.type("method", "poo");
    await page.wait(500);
    assert.equal(page.count("POST preview"), 2);
    assert.deepEqual([page.previews[1].values.ratio, page.previews[1].values.method], [0.5, "agent"]);
    page.type("min_tokens", ""); // an empty field is the default
    await page.wait(500);
    assert.equal(page.previews.at(-1).values.min_tokens, null);
});

test("controls that are not drawn are at what gradio last said of them, or left to the server", async (page) => {
    for (const name of ["min_tokens", "rules"]) page.find(name).remove();
    page.undrawn = {min_tokens: 7, rules: "full"};
    await opened(page);
    assert.deepEqual([page.previews[0].values.min_tokens, page.previews[0].values.rules], [undefined, undefined]);
    page.choose("Paper");
    await page.wait(500);
    assert.deepEqual([page.previews.at(-1).values.min_tokens, page.previews.at(-1).values.rules], [7, ""]);
});

test("nothing is asked while a size is being typed", async (page) => {
    await opened(page);
    page.type("width", "");
    await page.wait(1000);
    assert.equal(page.count("POST preview"), 1);
    page.type("width", "768");
    await page.wait(500);
    assert.equal(page.text("summary"), "768×512 at 0");
});

test("the hires sliders go along as they are", async (page) => {
    await opened(page);
    page.type("hr-checkbox", true);
    page.document.append(new Element("div", {id: "hr_checkpoint"}, new Element("input", {value: "Use same checkpoint"})));
    page.type("hr_scale", "");
    await page.wait(500);
    assert.equal(page.count("POST preview"), 1, "the scale is being typed");
    page.type("hr_scale", "1.5");
    page.type("hr_resize_x", "");
    await page.wait(500);
    assert.deepEqual(page.previews.at(-1).hires, {scale: 1.5, resize_y: 0, checkpoint: ""}, "the server knows the rest");
});

test("the host's steps, batch, sampler, override settings and hires checkpoint go along", async (page) => {
    const box = (id, value) => new Element("div", {id}, new Element("input", {type: "text", value}));
    const token = new Element("div", {className: "token", textContent: " Token merging ratio: 0.5 "});
    page.document.append(box("txt2img_steps", "8"), box("txt2img_batch_size", "3"), box("txt2img_sampling", "Euler"),
        box("txt2img_scheduler", "Karras"), box("txt2img_hires_steps", "4"), box("hr_checkpoint", "other.safetensors"),
        new Element("div", {id: "txt2img_override_settings"}, token));
    for (const name of ["steps", "batch_size", "hires_steps"]) page.document.querySelector(`#txt2img_${name} input`).type = "number";
    page.type("hr-checkbox", true);
    await opened(page);
    const {steps, batch_size, sampler, scheduler, hires, overrides} = page.previews.at(-1);
    assert.deepEqual([steps, batch_size, sampler, scheduler, hires.steps], [8, 3, "Euler", "Karras", 4]);
    assert.deepEqual([hires.checkpoint, overrides], ["other.safetensors", ["Token merging ratio: 0.5"]]);
});

test("img2img has the sliders' size, or that of Resize by, and no hires pass", async (page) => {
    page.type("hr-checkbox", true);
    await opened(page, "img2img");
    page.document.querySelector("#img2img_tab_resize_by").concealed = false;
    page.document.querySelector("#img2img_scale_resolution_preview").textContent = "resize: from 512x512 to 640x384";
    page.type("denoising_strength", "0.3", "img2img");
    await page.wait(500);
    const [before, after] = page.previews;
    assert.deepEqual([before.width, before.height, before.hires], [512, 512, null]);
    assert.deepEqual([after.tab, after.width, after.height, after.denoising], ["img2img", 640, 384, 0.3]);
});

// When it asks

test("a slider on its way is asked about once, at its end", async (page) => {
    await opened(page);
    for (const ratio of ["0.1", "0.2", "0.3", "0.4"]) {
        page.type("ratio", ratio);
        await page.wait(60);
    }
    await page.wait(1000);
    assert.deepEqual(page.previews.map(({values}) => values.ratio), [0, 0.4]);
});

test("an answer comes within half a second of the last change", async (page) => {
    await opened(page);
    page.type("ratio", "0.1");
    await page.wait(200);
    assert.equal(page.text("summary"), "512×512 at 0.1");
    page.find("ratio", "input").value = "0.2"; // moved by the host, which fires no event
    await page.wait(450);
    assert.equal(page.text("summary"), "512×512 at 0.2");
});

test("nothing is asked while the panel is not to be seen", async (page) => {
    page.load();
    await page.wait(5000);
    page.open();
    page.document.hidden = true;
    await page.wait(5000);
    assert.equal(page.asked.length, 0);
    page.document.hidden = false;
    await page.wait(1000);
    assert.equal(page.count("POST preview"), 1);
    page.open("txt2img", false);
    page.type("ratio", "0.5");
    await page.wait(5000);
    assert.equal(page.count("POST preview"), 1);
});

test("an older question is given up, and its answer dropped if it comes after all", async (page) => {
    page.deaf = true;
    const held = page.hold("POST preview");
    await opened(page);
    page.type("ratio", "0.5");
    await page.wait(500);
    assert.deepEqual(page.asked.filter(({name}) => name === "preview").map(({aborted}) => aborted), [true, false]);
    held[1].answer({lines: [{text: "newer", hint: ""}], preset: "Fast"});
    await page.wait(100);
    held[0].answer({lines: [{text: "older", hint: ""}], preset: "Fast"});
    await page.wait(1000);
    assert.equal(page.text("summary"), "newer");
});

test("the host's options count, those that matter", async (page) => {
    page.context.opts = {sd_model_checkpoint: "a", hypertile_enable_unet: false, font: "x"};
    await opened(page);
    page.context.opts = {...page.context.opts, font: "y"};
    await page.wait(1000);
    assert.equal(page.count("POST preview"), 1);
    for (const [i, change] of [{sd_model_checkpoint: "b"}, {hypertile_enable_unet: true}, {upcast_attn: true},
        {token_merging_ratio_hr: 0.5}].entries()) {
        page.context.opts = {...page.context.opts, ...change};
        await page.wait(1000);
        assert.equal(page.count("POST preview"), i + 2, JSON.stringify(change));
    }
});

test("after a generation it asks again", async (page) => {
    await opened(page);
    page.document.querySelector("#txt2img_interrupt").style.display = "block";
    await page.wait(1000);
    assert.equal(page.count("POST preview"), 1);
    page.document.querySelector("#txt2img_interrupt").style.display = "none";
    await page.wait(1000);
    assert.equal(page.count("POST preview"), 2);
});

test("while no model is loaded it asks every five seconds, and at once when a control changes", async (page) => {
    page.server["POST preview"] = {lines: [{text: "No model.", hint: ""}], preset: "Fast", model: false};
    await opened(page);
    await page.wait(10000);
    assert.equal(page.count("POST preview"), 3);
    page.type("ratio", "0.5");
    await page.wait(300);
    assert.equal(page.count("POST preview"), 4);
    page.server["POST preview"] = {lines: [{text: "A model.", hint: ""}], preset: "Custom", model: true};
    await page.wait(60000);
    assert.equal(page.count("POST preview"), 5);
    assert.equal(page.text("summary"), "A model.");
});

test("nothing is read out twice", async (page) => {
    await opened(page);
    const line = page.find("summary", ".prose").children[0];
    page.type("fp32", true); // the answer is the same
    await page.wait(1000);
    assert.equal(page.count("POST preview"), 2);
    assert.equal(page.find("summary", ".prose").children[0], line);
});

test("a summary that gradio has drawn anew is filled again", async (page) => {
    await opened(page);
    page.find("summary", ".prose").replaceChildren();
    await page.wait(500);
    assert.equal(page.text("summary"), "512×512 at 0");
    assert.equal(page.count("POST preview"), 1);
});

// Trouble

test("a server that does not answer is named, not hammered, and found again", async (page) => {
    await opened(page);
    const preview = page.server["POST preview"];
    page.server["POST preview"] = undefined;
    page.type("ratio", "0.1");
    await page.wait(300);
    assert.equal(page.text("summary"), UNREACHABLE);
    for (let i = 0; i < 40; i++) { // changing the controls all the time does not help
        page.type("ratio", `0.${10 + i}`);
        await page.wait(500);
    }
    assert.ok(page.count("POST preview") <= 6, `${page.count("POST preview")} questions in 20 seconds`);
    page.server["POST preview"] = preview;
    await page.wait(6000);
    assert.equal(page.text("summary"), "512×512 at 0.49");
    const before = page.count("POST preview");
    await page.wait(20000);
    assert.equal(page.count("POST preview"), before);
});

test("a server that is not there when the page loads is found later", async (page) => {
    const {"GET page": tables} = page.server;
    page.server["GET page"] = undefined;
    await opened(page);
    assert.equal(page.text("summary"), UNREACHABLE);
    await page.wait(20000);
    assert.ok(page.count("GET page") <= 5);
    page.server["GET page"] = tables;
    await page.wait(6000);
    assert.equal(page.text("summary"), "512×512 at 0");
});

test("whatever else is wrong with the server is told", async (page) => {
    await opened(page);
    for (const [status, words] of [[401, "log in again"], [404, "restart the server, which runs another version"],
        [500, "the server failed (500)"]]) {
        page.server["POST preview"] = {status, content: {detail: "x"}};
        page.type("ratio", `0.${status}`);
        await page.wait(6000);
        assert.equal(page.text("summary"), `The preview is not available: ${words}.`);
    }
    page.hold("POST preview"); // it accepts the question and then says nothing
    await page.wait(16000);
    assert.equal(page.text("summary"), UNREACHABLE);
});

// Help and marks

test("help is a tooltip of each control, in the host's translation", async (page) => {
    page.context.getTranslation = (text) => ({"Share of merged tokens.": "Anteil."})[text];
    await opened(page);
    assert.equal(page.find("ratio").title, "Anteil.");
    assert.equal(page.find("preset").title, "By intention.");
    const header = page.document.querySelector("#txt2img_agent_attention > .label-wrap");
    assert.equal(header.title, "Faster.");
});

test("a control without effect is greyed, with the reason in its tooltip", async (page) => {
    page.server["POST preview"] = {lines: [], preset: "Fast", idle: {ratio: "No effect with Method “pool”."}};
    await opened(page);
    assert.equal(page.find("ratio").title, "No effect with Method “pool”.\nShare of merged tokens.");
    assert.ok(page.find("ratio").classList.contains("agent-attention-idle"));
    page.server["POST preview"] = {lines: [], preset: "Fast", idle: {}};
    page.type("ratio", "0.1");
    await page.wait(1000);
    assert.equal(page.find("ratio").title, "Share of merged tokens.");
    assert.ok(!page.find("ratio").classList.contains("agent-attention-idle"));
});

test("where the panel never comes the script stops", async (page) => {
    page.document.append(new page.document.constructor("div", {id: "txt2img_prompt"}));
    for (const tab of ["txt2img", "img2img"]) page.document.querySelector(`#${tab}_agent_attention`).remove();
    page.load();
    await page.wait(30000);
    assert.ok(page.timers.every(({due}) => due === Infinity));
});

// Life

test("loaded twice, the newer one takes over", async (page) => {
    await opened(page);
    const held = page.hold("POST preview");
    page.type("ratio", "0.5");
    await page.wait(500);
    page.load();
    assert.equal(page.asked.at(-1).aborted, true);
    held[0].answer({lines: [{text: "of the older one", hint: ""}], preset: "Fast"});
    await page.wait(1000);
    assert.equal(page.text("summary"), "512×512 at 0");
    held[1].answer({lines: [{text: "of the newer one", hint: ""}], preset: "Custom"});
    await page.wait(1000);
    assert.equal(page.text("summary"), "of the newer one");
    assert.equal(page.count("POST preview"), 3);
});

test("stopped, it does nothing more", async (page) => {
    await opened(page);
    page.type("ratio", "0.5");
    page.readout.stop();
    const before = page.asked.length;
    await page.wait(20000);
    assert.equal(page.asked.length, before);
    assert.equal(page.text("summary"), "512×512 at 0");
});
