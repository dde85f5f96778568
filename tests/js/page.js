"use strict";
// A page with the panel, a server and a clock, all of them small, for javascript/agent_attention.js to run in.
const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");
const vm = require("node:vm");
const {Element} = require("./dom.js");

const SCRIPT = fs.readFileSync(path.join(__dirname, "..", "..", "javascript", "agent_attention.js"), "utf8");
const TABS = ["txt2img", "img2img"];

// What the server's page route answers: a few settings of each kind
const ROWS = [
    {name: "enabled", kind: "flag", choices: []},
    {name: "ratio", kind: "slider", choices: []},
    {name: "fp32", kind: "flag", choices: []},
    {name: "method", kind: "choice", choices: ["agent", "pool"]},
    {name: "min_tokens", kind: "number", choices: []},
    {name: "rules", kind: "text", choices: []},
];
const PAGE = {
    rows: ROWS,
    presets: {Fast: {ratio: 0, method: "agent", rules: ""}, Paper: {ratio: 0.4, method: "agent", rules: ""}},
    help: {enabled: "Faster.", ratio: "Share of merged tokens.", preset: "By intention."},
};
const DEFAULTS = {enabled: false, ratio: 0, fp32: false, method: "agent", min_tokens: 0, rules: ""};
const NAMES = ROWS.map((row) => row.name).filter((name) => name !== "enabled");

const presetOf = (values) => {
    const fits = (preset) => Object.entries(preset).every(([name, value]) => values[name] === value);
    return Object.keys(PAGE.presets).find((name) => fits(PAGE.presets[name])) ?? "Custom";
};
const summaryOf = ({values, width, height}) => `${width}×${height} at ${values.ratio}`;

const field = (id, own) => new Element("div", {id}, new Element("input", {type: "number", ...own}));
const html = (id) => new Element("div", {id}, new Element("div", {className: "prose"}));
const fold = (id, ...content) => new Element("div", {id}, new Element("div", {className: "label-wrap"}), ...content);

const control = (tab, {name, kind}) => {
    const id = name === "enabled" ? `${tab}_agent_attention-checkbox` : `${tab}_agent_attention_${name}`;
    if (kind === "flag") return field(id, {type: "checkbox", checked: DEFAULTS[name]});
    if (kind === "text") return new Element("div", {id}, new Element("textarea", {value: ""}));
    return field(id, {type: kind === "choice" ? "text" : "number", value: String(DEFAULTS[name])});
};

const panel = (tab) => {
    const id = (name) => `${tab}_agent_attention_${name}`;
    const button = (name) => new Element("button", {id: id(name)});
    const checkbox = (name) => field(id(name), {type: "checkbox"});
    return new Element("div", {id: `${tab}_agent_attention`, concealed: true},
        new Element("div", {className: "label-wrap"}),
        field(id("preset"), {type: "text", value: "Fast"}),
        button("sync"),
        html(id("summary")),
        ...ROWS.map((row) => control(tab, row)),
        fold(id("more")),
        fold(id("tuner")),
        fold(id("map"), checkbox("record"), button("map_show")),
        html(id("status")));
};

const host = (tab) => new Element("div", {id: `tab_${tab}`},
    ...["width", "height"].map((name) => field(`${tab}_${name}`, {value: "512"})),
    field(`${tab}_denoising_strength`, {value: "0.7"}),
    new Element("button", {id: `${tab}_interrupt`}),
    new Element("button", {id: `${tab}_interrupting`}),
    panel(tab));

const hires = () => [
    field("txt2img_hr-checkbox", {type: "checkbox"}),
    field("txt2img_hr_scale", {value: "2"}),
    field("txt2img_hr_resize_x", {value: "0"}),
    field("txt2img_hr_resize_y", {value: "0"}),
];

const storage = () => {
    const kept = new Map();
    return {
        getItem: (key) => kept.get(key) ?? null,
        setItem: (key, value) => kept.set(key, value),
        removeItem: (key) => kept.delete(key),
    };
};

const clock = (page) => class extends Date {
    static now() {
        return page.now;
    }

    toLocaleTimeString() {
        return this.toISOString().slice(11, 16);
    }
};

class Page {
    constructor() {
        this.now = 0;
        this.session = storage(); // lives as long as the page's tab
        this.timers = [];
        this.asked = []; // every request: {method, name, body, aborted}
        this.deaf = false; // whether an answer comes although nobody waits for it any more
        this.gradio = true; // whether gradio calls the script back
        this.pressed = []; // ids of the buttons that were clicked
        // What the server answers, by method and route: content, {status, content}, or a function that gives one of
        // them; undefined where it does not answer
        this.server = {
            "GET page": PAGE,
            "GET status": {run: 1, at: 45240, state: "acts", lines: [{text: "First pass: done", hint: "", state: "acts"}]},
            "POST preview": ({values, ...size}) => (
                {lines: [{text: summaryOf({values, ...size}), hint: ""}], preset: presetOf(values)}
            ),
        };
        const resize = new Element("div", {id: "img2img_tab_resize_by", concealed: true});
        const resized = new Element("div", {id: "img2img_scale_resolution_preview"});
        this.document = new Element("html", {hidden: false}, ...TABS.map(host), ...hires(), resize, resized);
        this.document.createElement = (tag) => new Element(tag);
        this.document.activeElement = null;
        this.document.addEventListener("click", ({target}) => this.clicked(target));
        this.context = vm.createContext({
            document: this.document,
            gradioApp: () => this.document,
            fetch: (url, init) => this.fetch(url, init),
            Date: clock(this),
            localStorage: storage(),
            sessionStorage: this.session,
            setTimeout: (call, delay, ...args) => this.later(call, delay, args),
            setInterval: (call, delay) => this.later(call, delay, [], delay),
            clearTimeout: (id) => this.forget(id),
            clearInterval: (id) => this.forget(id),
            requestAnimationFrame: (call) => this.later(call, 16, []),
            AbortController,
            Event: class {
                constructor(type) {
                    this.type = type;
                }
            },
        });
    }

    // The script

    load() {
        vm.runInContext(SCRIPT, this.context);
    }

    get readout() {
        return this.context.agentAttentionReadout;
    }

    // The clock

    later(call, delay, args, every = 0) {
        const id = this.timers.length + 1;
        this.timers.push({id, call, args, every, due: this.now + delay});
        return id;
    }

    forget(id) {
        if (this.timers[id - 1]) this.timers[id - 1].due = Infinity;
    }

    async wait(milliseconds) {
        const end = this.now + milliseconds;
        for (;;) {
            await new Promise(setImmediate); // what was awaited goes on
            const next = this.timers.reduce((a, b) => (b.due < a.due ? b : a), {due: Infinity});
            if (next.due > end) break;
            this.now = next.due;
            next.due = next.every ? next.due + next.every : Infinity;
            next.call(...next.args);
        }
        this.now = end;
    }

    // The server

    fetch(url, {method = "GET", body, signal, headers = {}} = {}) {
        const [name, query] = url.replace("./agent-attention/", "").split("?");
        assert.ok(url.startsWith("./agent-attention/"));
        assert.equal(headers["Content-Type"], body && "application/json");
        const request = {method, name, body: body && JSON.parse(body), aborted: false};
        this.asked.push(request);
        return new Promise((resolve, reject) => {
            signal?.addEventListener("abort", () => {
                request.aborted = true;
                if (!this.deaf) reject(new Error("aborted"));
            });
            const given = this.server[`${method} ${name}`];
            Promise.resolve(typeof given === "function" ? given(request.body ?? query) : given).then((answer) => {
                if (answer === undefined) throw new TypeError("Failed to fetch");
                const {status = 200, content = answer} = answer ?? {};
                resolve({ok: status < 300, status, json: async () => JSON.parse(JSON.stringify(content))});
            }).catch(reject);
        });
    }

    // How often something was asked for, such as "POST preview"
    count(what) {
        return this.asked.filter(({method, name}) => `${method} ${name}` === what).length;
    }

    get previews() {
        return this.asked.filter(({name}) => name === "preview").map(({body}) => body);
    }

    // A question that the test answers itself: {answer} with the content.
    hold(route) {
        const held = [];
        this.server[route] = () => new Promise((answer) => held.push({answer}));
        return held;
    }

    // The user

    find(name, inner = "", tab = "txt2img") {
        return this.document.querySelector(`#${tab}_agent_attention_${name} ${inner}`.trim());
    }

    text(name, tab = "txt2img") {
        return this.find(name, "", tab).textContent;
    }

    open(tab = "txt2img", shown = true) {
        this.document.querySelector(`#${tab}_agent_attention`).concealed = !shown;
    }

    // Type into one of our controls, or into the host's where there is none.
    type(name, value, tab = "txt2img") {
        const inner = "input, textarea";
        const element = this.find(name) ?? this.document.querySelector(`#${tab}_${name}`);
        const typed = element.querySelector(inner);
        typed[typed.type === "checkbox" ? "checked" : "value"] = value;
        typed.dispatchEvent({type: "input"});
    }

    // gradio

    controls(tab) {
        return NAMES.map((name) => {
            const {kind} = ROWS.find((row) => row.name === name);
            const element = this.find(name, "", tab)?.querySelector("input, textarea");
            if (!element) return this.undrawn?.[name];
            if (kind === "flag") return element.checked;
            return ["choice", "text"].includes(kind) ? element.value : Number(element.value);
        });
    }

    // Have the script's handler fill the preset and the controls, as gradio does.
    handle(call, tab) {
        const preset = this.find("preset", "input", tab);
        const [name, ...values] = this.readout[call](tab, [preset.value, ...this.controls(tab)]);
        this.later(() => {
            preset.value = name;
            NAMES.forEach((setting, i) => {
                const element = this.find(setting, "", tab)?.querySelector("input, textarea");
                if (element) element[element.type === "checkbox" ? "checked" : "value"] = values[i];
            });
        }, 20, []);
        return [name, ...values];
    }

    choose(preset, tab = "txt2img") {
        this.find("preset", "input", tab).value = preset;
        return this.handle("choose", tab);
    }

    clicked(target) {
        const tab = TABS.find((name) => target.id === `${name}_agent_attention_sync`);
        this.pressed.push(target.id);
        if (tab && this.gradio) this.handle("sync", tab);
    }
}

const tests = [];
const test = (name, body) => tests.push({name, body});

// Runs a file's tests, or the one that the command line names, and prints a line of JSON for each.
setImmediate(async () => {
    for (const {name, body} of tests.filter((one) => !process.argv[2] || one.name === process.argv[2])) {
        const error = await body(new Page()).then(() => "", (found) => found.stack);
        console.log(JSON.stringify({name, error}));
    }
});

module.exports = {test, assert, PAGE, DEFAULTS, NAMES, ROWS};
