"use strict";
// The preset's control and the other controls, which gradio fills on the script's word.
const {test, assert, PAGE, DEFAULTS, NAMES, ROWS} = require("./page.js");

const READY = {agent_attention_status_line: true, agent_attention_preset: "as saved"};
const PAPER = NAMES.map((name) => ({...DEFAULTS, ...PAGE.presets.Paper})[name]);

const opened = async (page, tab = "txt2img") => {
    page.load();
    page.open(tab);
    await page.wait(1000);
};

const preset = (page, tab = "txt2img") => page.find("preset", "input", tab).value;
const syncs = (page) => page.pressed.filter((id) => id.endsWith("_sync")).length;

test("choose fills in what the preset has, and keeps the rest", async (page) => {
    await opened(page);
    assert.deepEqual([...page.readout.choose("txt2img", ["Paper", 0.1, true, "pool", 64, "full"])],
        ["Paper", 0.4, true, "agent", 64, ""]);
    assert.deepEqual([...page.readout.choose("txt2img", ["Custom", 0.1, true, "pool", 64, "full"])],
        ["Custom", 0.1, true, "pool", 64, "full"]);
});

test("before the tables are there both handlers change nothing", async (page) => {
    page.load();
    const given = ["Paper", ...PAPER];
    assert.deepEqual([...page.readout.choose("txt2img", given)], given);
    assert.deepEqual([...page.readout.sync("txt2img", given)], given);
});

test("a preset that was chosen stays, and is asked about", async (page) => {
    await opened(page);
    page.choose("Paper");
    await page.wait(5000);
    assert.equal(page.previews.at(-1).values.ratio, 0.4);
    assert.equal(preset(page), "Paper");
    assert.equal(syncs(page), 0);
});

test("changing a control makes it Custom, and changing it back names the preset again", async (page) => {
    await opened(page);
    page.type("ratio", "0.1");
    await page.wait(2000);
    assert.equal(preset(page), "Custom");
    page.type("ratio", "0.4");
    await page.wait(2000);
    assert.equal(preset(page), "Paper");
    assert.equal(page.find("ratio", "input").value, 0.4);
    assert.equal(syncs(page), 2);
});

test("Custom, chosen while the controls are a preset's, becomes that preset again without a question", async (page) => {
    await opened(page);
    page.choose("Custom");
    await page.wait(2000);
    assert.equal(preset(page), "Fast");
    assert.equal(page.count("POST preview"), 1);
});

test("a preset being chosen is not overwritten", async (page) => {
    await opened(page);
    const field = page.find("preset", "input");
    page.document.activeElement = field;
    field.value = "Pap";
    await page.wait(5000);
    assert.equal(field.value, "Pap");
    page.document.activeElement = null;
    await page.wait(2000);
    assert.equal(field.value, "Fast");
});

test("a slow answer about the controls before does not undo a preset", async (page) => {
    await opened(page);
    const held = page.hold("POST preview");
    page.type("ratio", "0.1");
    await page.wait(300);
    page.choose("Paper");
    held[0].answer({lines: [], preset: "Custom"});
    await page.wait(3000);
    held.at(-1).answer({lines: [], preset: "Paper"});
    await page.wait(3000);
    assert.deepEqual([preset(page), Number(page.find("ratio", "input").value)], ["Paper", 0.4]);
    assert.equal(syncs(page), 0);
});

test("rules being typed are not written anew", async (page) => {
    await opened(page);
    page.document.activeElement = page.find("rules", "textarea");
    page.type("rules", "full");
    await page.wait(5000);
    assert.equal(syncs(page), 0);
    page.document.activeElement = null;
    await page.wait(2000);
    assert.equal(preset(page), "Custom");
});

test("a preset whose controls are still being filled is not overwritten", async (page) => {
    await opened(page);
    for (let i = 0; i < 20; i++) {
        const [name, chosen] = i % 2 ? ["Fast", "0"] : ["Paper", "0.4"];
        page.find("preset", "input").value = name;
        await page.wait(100 + i); // gradio is slow
        page.choose(name);
        await page.wait(2000);
        assert.deepEqual([preset(page), String(page.find("ratio", "input").value)], [name, chosen]);
    }
    assert.equal(syncs(page), 0);
});

test("a refusal leaves the preset's name as it is", async (page) => {
    await opened(page);
    page.server["POST preview"] = {status: 422, content: {detail: "no"}};
    page.type("ratio", "7");
    await page.wait(5000);
    assert.equal(preset(page), "Fast");
});

test("the preset of the settings page is filled in once, in both tabs, closed or open", async (page) => {
    page.context.opts = {...READY, agent_attention_preset: "Paper"};
    page.load();
    await page.wait(3000);
    for (const tab of ["txt2img", "img2img"]) {
        assert.equal(preset(page, tab), "Paper");
        assert.equal(Number(page.find("ratio", "input", tab).value), 0.4);
    }
    assert.equal(syncs(page), 2);
    assert.equal(page.count("POST preview"), 0);
    page.find("ratio", "input").value = "0.1"; // an infotext is pasted, which opens the panel
    page.open();
    await page.wait(3000);
    assert.equal(Number(page.find("ratio", "input").value), 0.1);
    assert.equal(preset(page), "Custom");
});

test("it is filled in as soon as gradio listens", async (page) => {
    page.context.opts = {...READY, agent_attention_preset: "Paper"};
    page.gradio = false;
    page.load();
    await page.wait(10000);
    assert.ok(syncs(page) <= 20, "once a second for each tab");
    page.gradio = true;
    await page.wait(2000);
    assert.equal(preset(page), "Paper");
});

// gradio's own account of what it drew
const DRAWN = (tab) => ROWS.filter(({name}) => name !== "enabled").map(({name}) => (
    {props: {elem_id: `${tab}_agent_attention_${name}`, value: DEFAULTS[name]}}
));

test("an infotext that was pasted before the preset came stays", async (page) => {
    page.context.opts = {...READY, agent_attention_preset: "Paper"};
    page.context.gradio_config = {components: [{props: {}}, ...DRAWN("txt2img"), ...DRAWN("img2img")]};
    page.gradio = false;
    page.load();
    await page.wait(1500);
    page.find("min_tokens", "input").value = "7"; // all other settings are the defaults
    page.gradio = true;
    await page.wait(5000);
    assert.deepEqual([page.find("ratio", "input").value, page.find("min_tokens", "input").value], [0, 7]);
    assert.equal(Number(page.find("ratio", "input", "img2img").value), 0.4, "nothing was pasted there");
});

test("an infotext of the defaults stays, whichever of the host's buttons brings it", async (page) => {
    for (const id of ["paste", "txt2img_tab"]) {
        page.context.opts = {...READY, agent_attention_preset: "Paper"};
        page.gradio = false;
        page.load();
        await page.wait(1500);
        const button = new page.document.constructor("button", {id});
        page.document.append(button);
        button.click();
        page.gradio = true;
        await page.wait(5000);
        assert.equal(Number(page.find("ratio", "input").value), 0);
    }
});

test("as saved leaves the controls alone", async (page) => {
    page.context.opts = READY;
    await opened(page);
    await page.wait(5000);
    assert.equal(syncs(page), 0);
});
