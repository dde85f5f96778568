"use strict";
// The panel's live readout: what the settings do at the current size, said while the sliders move.
//
// The first half is arithmetic and knows no page: it is agentsd/config.py, agentsd/costs.py and the panel's reading of
// its controls (agentsd/webui/settings.py) once more, number for number. tests/cases/ holds the tables that both
// languages must reproduce. All constants come from the server (agentsd/costs.json and the tables of settings).
{
    // ---- Arithmetic: agentsd/config.py ----

    const cells = (length, side) => Math.ceil(length / side);

    const untouched = (tokens, r, reason) => (
        {action: "untouched", tokens, queries: tokens, agents: 0, cell: null, r, agent_r: 0, reason}
    );

    const gridCell = (agentRatio, height, width, maxAgents) => {
        let s = 2 ** Math.floor(0.5 - 0.5 * Math.log2(1 - agentRatio));
        while (maxAgents !== null && cells(height, s) * cells(width, s) > maxAgents) s *= 2;
        return s;
    };

    const destinations = (config, height, width) => Math.floor(height / config.sy) * Math.floor(width / config.sx);

    const similarityAgents = (config, tokens, nDst) => {
        let agentR = Math.trunc(tokens * config.agent_ratio);
        if (config.max_agents !== null && agentR) agentR = Math.max(agentR, tokens - config.max_agents);
        return nDst ? Math.min(agentR, tokens - nDst) : 0;
    };

    // How many agents a layer would have, whether or not they are few enough to be used.
    const agentsWanted = (config, height, width) => {
        const N = height * width;
        if (config.agent_source === "grid") {
            const s = gridCell(config.agent_ratio, height, width, config.max_agents);
            return {n: cells(height, s) * cells(width, s), cell: [s, s], agentR: 0};
        }
        const agentR = similarityAgents(config, N, destinations(config, height, width));
        return {n: N - agentR, cell: null, agentR};
    };

    const planPool = (config, height, width, r) => {
        const N = height * width;
        const n = cells(height, config.sy) * cells(width, config.sx);
        if (n >= N) return untouched(N, r, "cells of 1 × 1 pool nothing");
        return {action: "pool", tokens: N, queries: N, agents: n, cell: [config.sy, config.sx], r, agent_r: 0, reason: ""};
    };

    // cells that reach their middle, where the token is taken
    const samples = (length, side) => cells(length - Math.floor((Math.min(side, length) - 1) / 2), side);

    const FEWEST_CORRECTED = 32;

    const correctedAgents = (config, height, width) => {
        const count = (side) => samples(height, side) * samples(width, side);
        let s = agentsWanted({...config, agent_source: "grid"}, height, width).cell[0];
        while (s > 1 && count(s) < FEWEST_CORRECTED) s /= 2;
        return {s, n: count(s)};
    };

    const tooFewToCorrect = (config, n) => config.max_agents !== null && n > config.max_agents;

    const planCorrected = (config, height, width, r) => {
        const N = height * width;
        const {s, n} = correctedAgents(config, height, width);
        if (tooFewToCorrect(config, n)) return untouched(N, r, `max_agents ${config.max_agents} are too few to correct`);
        if (2 * n >= N) return untouched(N, r, `2 × ${n} agents are not below ${N} queries`);
        return {action: "corrected", tokens: N, queries: N, agents: n, cell: [s, s], r, agent_r: 0, reason: ""};
    };

    const planLayer = (config, height, width, downsample) => {
        const N = height * width;
        if (downsample > config.max_downsample) {
            return untouched(N, 0, `downsample ${downsample} is above ${config.max_downsample}`);
        }
        if (config.min_tokens > N) return untouched(N, 0, `${N} tokens are below min_tokens ${config.min_tokens}`);
        const nDst = destinations(config, height, width);
        const r = nDst ? Math.min(Math.trunc(N * config.ratio), N - nDst) : 0;
        if (!config.merge_attn) return untouched(N, r, "merge_attn is off");
        if (config.method === "pool") return planPool(config, height, width, r);
        if (config.method === "corrected") return planCorrected(config, height, width, r);
        const {n, cell, agentR} = agentsWanted(config, height, width);
        if (2 * n < N - r) {
            return {action: "agents", tokens: N, queries: N - r, agents: n, cell, r, agent_r: agentR, reason: ""};
        }
        if (r) return {action: "merge", tokens: N, queries: N - r, agents: 0, cell: null, r, agent_r: 0, reason: ""};
        return untouched(N, 0, `2 × ${n} agents are not below ${N} queries`);
    };

    // ---- Arithmetic: agentsd/costs.py ----

    const PROMPT_TOKENS = 77;
    const FIT_STEPS = 3;

    const selfAttentionFlops = (C, plan) => {
        const {tokens: N, queries: M, agents: n} = plan;
        if (plan.action === "agents") return 8 * M * C * C + (plan.r ? 2 * n * C * C : 0) + 8 * n * M * C;
        if (plan.action === "merge") return 8 * M * C * C + 4 * M * M * C;
        if (plan.action === "pool") return 8 * N * C * C + 4 * N * n * C;
        if (plan.action === "corrected") {
            return 8 * N * C * C + 8 * n * N * C + (4 + 4 * FIT_STEPS) * n * n * C;
        }
        return 8 * N * C * C + 4 * N * N * C;
    };

    const blockFlops = (C, height, width, config, plan) => {
        const N = plan.tokens;
        const cross = config && config.merge_crossattn ? N - plan.r : N;
        const feed = config && config.merge_mlp ? N - plan.r : N;
        let total = selfAttentionFlops(C, plan);
        total += 4 * cross * C * C + 4 * PROMPT_TOKENS * cross * C;
        total += 24 * feed * C * C;
        const merges = config && (config.merge_crossattn || config.merge_mlp || ["agents", "merge"].includes(plan.action));
        if (plan.agent_r || (plan.r && merges)) {
            const nDst = destinations(config, height, width);
            total += 2 * (N - nDst) * nDst * C;
        }
        return total;
    };

    // What a config (its stages aside; null: nothing) does to a U-Net for a latent of height × width.
    const estimate = (layout, config, height, width) => {
        const levels = layout.blocks.map(({downsample, channels, count}) => {
            const h = cells(height, downsample), w = cells(width, downsample);
            const nothing = untouched(h * w, 0, "");
            const plan = config ? planLayer(config, h, w, downsample) : nothing;
            return {
                downsample, count, plan, height: h, width: w,
                flops: blockFlops(channels, h, w, null, nothing),
                flops_left: blockFlops(channels, h, w, config, plan),
            };
        });
        let rest = layout.constant;
        for (const [level, flops] of layout.rest) rest += flops * cells(height, level) * cells(width, level);
        let flops = rest, left = rest, layers = 0;
        for (const level of levels) {
            flops += level.count * level.flops;
            left += level.count * level.flops_left;
            layers += level.plan.action === "untouched" ? 0 : level.count;
        }
        return {levels, flops, flops_left: left, share: left / flops, layers};
    };

    const within = (config, stage) => (stage.settings === null ? null : {...config, stages: [], ...stage.settings});

    // Share of the FLOPs left over a whole pass that starts when the fraction `start` of the diffusion is done.
    const shareOfRun = (layout, config, height, width, start = 0) => {
        if (!config.stages.length) return estimate(layout, config, height, width).share;
        if (start >= 1) return 1;
        let total = 0, low = start;
        for (const stage of config.stages) {
            if (stage.until > low) {
                total += (stage.until - low) * estimate(layout, within(config, stage), height, width).share;
                low = stage.until;
            }
        }
        return (total + (1 - low)) / (1 - start);
    };

    // ---- The panel's controls: agentsd/webui/settings.py ----

    const firstDownsample = (layout) => Math.min(...layout.blocks.map((group) => group.downsample));

    // The config of one pass, null where the pass is left alone, or {error}.
    const configOf = (values, {hires, layout}, data) => {
        if (!values.enabled || values.passes === (hires ? "first" : "hires")) return null;
        const until = hires ? "hires_until" : "until";
        if (values.since >= values[until]) {
            return {error: `agents begin at ${values.since} and end at ${values[until]}`};
        }
        const config = {...data.config, attn_precision: values.fp32 ? "fp32" : null};
        for (const name of Object.keys(data.config)) if (name in values) config[name] = values[name];
        config.max_agents = values.max_agents || null;
        const auto = values.max_downsample === "auto";
        config.max_downsample = auto ? firstDownsample(layout) : Number(values.max_downsample);
        config.stages = [];
        if (values.since > 0 || values[until] < 1) {
            if (values.since > 0) config.stages.push({until: values.since, settings: null});
            config.stages.push({until: values[until], settings: {}});
            const after = values.after === "nothing" ? null : data.after[values.after];
            if (values[until] < 1) config.stages.push({until: 1, settings: after});
        }
        return config;
    };

    // ---- What the host makes of its own sliders ----

    // (width, height) of the hires pass, as the WebUI computes it.
    const hiresSize = ({width, height, scale, resizeX, resizeY}) => {
        if (!resizeX && !resizeY) return [Math.trunc(width * scale), Math.trunc(height * scale)];
        if (!resizeY) return [resizeX, Math.floor(resizeX * height / width)];
        if (!resizeX) return [Math.floor(resizeY * width / height), resizeY];
        return [resizeX, resizeY];
    };

    // Why the host's own options keep a pass from us: [reason, control] or null. See agentsd/webui/compat.py.
    const hostObstacle = (opts, {hires, img2img}) => {
        if (opts.hypertile_enable_unet || (hires && opts.hypertile_enable_unet_secondpass)) {
            return ["HyperTile is on", "Settings → HyperTile"];
        }
        const special = hires ? opts.token_merging_ratio_hr : img2img ? opts.token_merging_ratio_img2img : 0;
        if ((special || opts.token_merging_ratio || 0) > 0) {
            return ["the WebUI's own token merging is on", "Settings → Optimizations"];
        }
        return null;
    };

    // ---- The sentences ----

    const percent = (share) => `${Math.round(share * 100)}\u00a0%`; // a line must not break there

    const layerWords = ({plan, count}) => {
        const layers = `in ${count} ${count === 1 ? "layer" : "layers"}`;
        if (plan.action === "merge") return `${plan.tokens} tokens → ${plan.queries} merged ${layers}`;
        const kind = {pool: "pooled keys", corrected: "corrected agents"}[plan.action] || "agents";
        const merged = plan.action === "agents" && plan.r ? ` (${plan.queries} queries)` : "";
        return `${plan.tokens} tokens → ${plan.agents} ${kind}${merged} ${layers}`;
    };

    // Why no self-attention of this config's layers is changed: [reason, names of the controls to change].
    const whyNothing = (config, levels) => {
        const reached = levels.filter((level) => level.downsample <= config.max_downsample);
        if (!config.merge_attn) return ["self-attention is left out", ["merge_attn"]];
        if (!reached.length) {
            const first = Math.min(...levels.map((level) => level.downsample));
            return [`this model's attention starts at level ${first}`, ["max_downsample"]];
        }
        const big = reached.filter((level) => level.plan.tokens >= config.min_tokens);
        if (!big.length) {
            const most = Math.max(...reached.map((level) => level.plan.tokens));
            return [`the size is too small: ${most} tokens, and layers below ${config.min_tokens} are left alone`,
                ["min_tokens"]];
        }
        if (config.method === "pool") return ["cells of 1 × 1 pool nothing", ["sx", "sy"]];
        return tooManyAgents(config, big[0]);
    };

    const tooManyAgents = (config, {height, width, plan}) => {
        const corrected = config.method === "corrected", grid = corrected || config.agent_source === "grid";
        const {n} = corrected ? correctedAgents(config, height, width) : agentsWanted(config, height, width);
        if (corrected && tooFewToCorrect(config, n)) {
            return [`at most ${config.max_agents} agents are too few to correct`, ["max_agents"]];
        }
        const reason = `${n} agents are too many for ${plan.queries} queries (fewer than half are needed)`;
        const capped = !grid && n === destinations(config, height, width);
        const controls = capped ? ["sx", "sy"] : ["agent_ratio"];
        return [reason, plan.r ? [...controls, "ratio"] : controls];
    };

    // The parts of a pass in which we are meant to act: [{config, own}], "own" being the panel's settings, the other
    // what comes afterwards.
    const partsOf = (config, start) => {
        if (!config.stages.length) return [{config, own: true}];
        const reached = config.stages.filter((stage) => stage.until > start && stage.settings !== null);
        return reached.map((stage) => ({config: within(config, stage), own: !Object.keys(stage.settings).length}));
    };

    const acts = (found) => found.layers > 0 || found.flops_left !== found.flops;

    const describe = (found) => {
        const acted = found.levels.filter((level) => level.plan.action !== "untouched");
        const words = acted.length ? acted.map(layerWords).join(", ") : "tokens merged outside self-attention";
        return `${words}; ${percent(found.share)} of the U-Net's FLOPs left`;
    };

    // What to say beside a part that acts: [hint, controls].
    const advice = (part, found, own, late) => {
        if (!part.own && late) return ["agents end before this pass begins, so only what comes afterwards is done", [late]];
        if (!part.own) {
            const [reason, controls] = whyNothing(own.config, own.found.levels);
            return [`no agents: ${reason}`, controls];
        }
        const acted = found.levels.filter((level) => level.plan.action !== "untouched");
        const merging = acted.length && acted.every((level) => level.plan.action === "merge");
        if (merging && part.config.agent_ratio > 0) {
            const [reason, controls] = tooManyAgents(part.config, acted[0]);
            return [`no agents: ${reason}`, controls];
        }
        return found.share > 1 ? ["this costs more than it saves", ["agent_ratio"]] : ["", []];
    };

    const milliseconds = ({before, after}) => `${Math.round(before)} → ${Math.round(after)}\u00a0ms a U-Net call`;

    // One pass in words: {text, hint, controls, acts}. `measured` is what Measure found for it, if it did; `start` is the fraction of the diffusion done when it begins.
    const passWords = (values, pass, data) => {
        const {hires, width, height, start, layout, obstacle} = pass;
        const size = `${hires ? "Hires " : ""}${width}×${height}`;
        const nothing = (hint, controls) => ({text: `${size}: nothing happens`, hint, controls, acts: false});
        if (obstacle) return nothing(obstacle[0], [obstacle[1]]);
        const config = configOf({...values, enabled: true}, pass, data);
        if (config === null) return nothing("this pass is left out", ["passes"]);
        const end = hires ? "hires_until" : "until";
        if (config.error) return nothing(config.error, ["since", end]);
        const rows = Math.floor(height / 8), columns = Math.floor(width / 8);
        const parts = partsOf(config, start).map((part) => ({...part, found: estimate(layout, part.config, rows, columns)}));
        const part = parts.find(({found}) => acts(found));
        const own = parts.find((one) => one.own);
        if (!part && own) return nothing(...whyNothing(own.config, own.found.levels));
        if (!part) {
            const begins = `${percent(start)} of the diffusion is done when this pass begins`;
            return nothing(`${begins}, and agents end at ${percent(values[end])}`, [end]);
        }
        const [hint, controls] = advice(part, part.found, own, own ? "" : end);
        const run = shareOfRun(layout, config, rows, columns, start);
        const over = config.stages.length ? `, ${percent(run)} over the whole pass` : "";
        const timed = pass.measured ? `; measured: ${milliseconds(pass.measured)}` : "";
        return {text: `${size}: ${describe(part.found)}${over}${timed}`, hint, controls, acts: true};
    };

    // The panel's summary: one entry for each pass; a pass that the user left out is not worth one, unless no other is.
    const summary = (values, passes, data) => {
        const said = passes.map((pass) => passWords(values, pass, data));
        const chosen = said.filter((words) => words.controls[0] !== "passes");
        if (chosen.length) return chosen;
        const hint = values.passes === "hires" ? "only the hires pass is chosen, and there is none" : said[0].hint;
        return [{...said[0], hint}];
    };

    // The hint as a sentence that names the controls by their labels.
    const hintSentence = ({hint, controls}, data) => {
        if (!hint) return "";
        const labels = controls.map((name) => `“${data.labels[name] || name}”`);
        const change = labels.length ? ` Change ${labels.join(" or ")}.` : "";
        return `${hint[0].toUpperCase()}${hint.slice(1)}.${change}`;
    };

    // ---- Presets: agentsd/webui/presets.py ----

    const presetOf = (values, data) => {
        const fits = (preset) => Object.entries(preset).every(([name, value]) => values[name] === value);
        const found = Object.entries(data.presets).find(([, preset]) => fits(preset));
        return found ? found[0] : data.custom;
    };

    // ---- Measurements: agentsd/webui/measure.py ----

    const MEBIBYTE = 2 ** 20;

    const measuredRow = ({width, height, hires, before, after, peak_before: from, peak_after: to, distance}) => [
        `${hires ? "Hires " : ""}${width}×${height}`,
        `${Math.round(before)}\u00a0ms`,
        `${Math.round(after)}\u00a0ms`,
        `${(before / after).toFixed(2)}×`,
        from === null || to === null ? "–" : `${Math.round(from / MEBIBYTE)} → ${Math.round(to / MEBIBYTE)} MiB`,
        `${(100 * distance).toFixed(1)}\u00a0%`,
    ];
    const MEASURED_HEAD = ["Size", "Without", "With", "Speed-up", "Peak memory", "Output differs"];

    const pure = {presetOf, measuredRow, planLayer, estimate, shareOfRun, configOf, hiresSize, hostObstacle, summary, hintSentence};

    // ---- The page ----

    const TABS = ["txt2img", "img2img"];
    const ROUTE = "./agent-attention";
    const FOLDS = ["more", "measuring", "map"];
    const POLL_MS = 250; // sliders that the host moves by itself (paste, swap, presets) tell nobody
    const MODEL_RETRY_MS = 5000;
    const MEASURE_POLL_MS = 400;

    const find = (selector) => gradioApp().querySelector(selector);
    const numberIn = (id) => Number(find(`#${id} input[type=number]`)?.value ?? NaN);
    const isChecked = (id) => Boolean(find(`#${id} input[type=checkbox]`)?.checked);
    const isShown = (element) => Boolean(element && element.offsetParent);
    const panelId = (tab, name = "") => `${tab}_agent_attention${name && "_" + name}`;
    const options = () => (typeof opts === "undefined" ? {} : opts);

    // The value of one control; undefined while a field is being edited and holds none, and where gradio 6 has not drawn
    // what is folded.
    const readControl = (tab, row) => {
        const id = row.name === "enabled" ? `${panelId(tab)}-checkbox` : panelId(tab, row.name);
        if (row.kind === "flag") return find(`#${id}`) ? isChecked(id) : undefined;
        if (row.kind === "choice") {
            const text = find(`#${id} input`)?.value;
            return row.choices.includes(text) ? text : undefined;
        }
        const field = find(`#${id} input[type=number]`);
        const value = field && field.value !== "" ? Number(field.value) : NaN;
        return value >= row.low && value <= row.high ? value : undefined;
    };

    // All controls as far as they can be read; `known` fills in for fields that are being edited.
    const readControls = (tab, data, known) => {
        const found = data.rows.map((row) => [row.name, readControl(tab, row) ?? known[row.name]]);
        return Object.fromEntries(found);
    };

    // Size of an img2img pass: the sliders', or what "Resize by" makes of the image.
    const img2imgSize = () => {
        const byScale = isShown(find("#img2img_tab_resize_by"));
        const shown = byScale ? find("#img2img_scale_resolution_preview")?.textContent.match(/(\d+)x(\d+)\D*$/) : null;
        return shown ? [Number(shown[1]), Number(shown[2])] : [numberIn("img2img_width"), numberIn("img2img_height")];
    };

    const passesOf = (tab, layout) => {
        const pass = (width, height, start, hires) => (
            {width, height, start, hires, layout, obstacle: hostObstacle(options(), {hires, img2img: tab === "img2img"})}
        );
        const late = 1 - numberIn(`${tab}_denoising_strength`);
        if (tab === "img2img") return [pass(...img2imgSize(), late, false)];
        const width = numberIn("txt2img_width"), height = numberIn("txt2img_height");
        const passes = [pass(width, height, 0, false)];
        if (isChecked("txt2img_hr-checkbox")) {
            const resizeX = numberIn("txt2img_hr_resize_x"), resizeY = numberIn("txt2img_hr_resize_y");
            const scaled = hiresSize({width, height, scale: numberIn("txt2img_hr_scale"), resizeX, resizeY});
            passes.push(pass(...scaled, late, true));
        }
        return passes.every((one) => one.width > 0 && one.height > 0) ? passes : [];
    };

    // A line of one of the panel's two gr.HTML elements; what is in it is ours alone.
    const fill = (element, lines) => {
        const target = element.querySelector(".prose") || element;
        target.replaceChildren(...lines.map(({text, hint}) => {
            const line = document.createElement("div");
            line.textContent = text && hint ? `${text}.` : text;
            if (hint) {
                const more = document.createElement("span");
                more.className = "agent-attention-hint";
                more.textContent = ` ${hint}`;
                line.append(more);
            }
            return line;
        }));
        target.setAttribute("role", "status");
    };

    const table = (head, rows) => {
        const made = document.createElement("table");
        for (const [i, cells] of [head, ...rows].entries()) {
            const line = made.insertRow();
            for (const text of cells) {
                const cell = document.createElement(i ? "td" : "th");
                cell.textContent = text;
                line.append(cell);
            }
        }
        return made;
    };

    const ask = async (name, method = "GET", body = undefined) => {
        const headers = body ? {"Content-Type": "application/json"} : {};
        const answer = await fetch(`${ROUTE}/${name}`, {method, headers, body: body && JSON.stringify(body)});
        if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
        return answer.json();
    };

    // Everything that runs in the page; `stop` takes all of it back.
    const makeReadout = () => {
        const stopped = new AbortController();
        const last = {}; // what each line was last made from
        const measured = {}; // what was measured, by settings and size
        const loaded = {}, wanted = {}; // tabs that have been seen, and presets that are to be filled in
        let data = null, asked = -Infinity, generating = false, greeted = false, checkpoint;

        const learn = async () => {
            asked = Date.now();
            data = await ask("readout").catch(() => data);
        };

        // What a measurement holds for: the settings, the size, and the model.
        const timingKey = ({enabled, ...values}, {width, height, hires}) => (
            JSON.stringify([values, width, height, hires, options().sd_model_checkpoint])
        );

        const layoutNow = () => (data.model ? data.model.layout : data.layouts["SD 1"]);

        // The preset's control says what the others are, whoever has set them.
        const showPreset = (tab, values) => {
            const field = find(`#${panelId(tab, "preset")} input`);
            if (!field || field === document.activeElement) return;
            if (!loaded[tab]) {
                loaded[tab] = true;
                wanted[tab] = options().agent_attention_preset;
            }
            if (wanted[tab] in data.presets || field.value !== presetOf(values, data)) {
                find(`#${panelId(tab, "sync")}`).click();
            }
        };

        // Handlers of gradio: [preset, every control but "enabled"] in, the same out.
        const choose = (tab, [preset, ...values]) => {
            const chosen = data && data.presets[preset];
            const names = data ? data.rows.map((row) => row.name).filter((name) => name !== "enabled") : [];
            return [preset, ...values.map((value, i) => (chosen && names[i] in chosen ? chosen[names[i]] : value))];
        };
        const sync = (tab, [preset, ...values]) => {
            const name = wanted[tab];
            wanted[tab] = undefined;
            if (data && name in data.presets) return choose(tab, [name, ...values]);
            return [data ? presetOf(readControls(tab, data, data.defaults), data) : preset, ...values];
        };

        // A button that puts the proposed threshold into its control.
        const proposal = (tab, minTokens) => {
            const button = document.createElement("button");
            button.textContent = `Set ${data.labels.min_tokens} to ${minTokens}`;
            button.addEventListener("click", () => {
                const field = find(`#${panelId(tab, "min_tokens")} input[type=number]`);
                field.value = minTokens;
                field.dispatchEvent(new Event("input", {bubbles: true}));
            });
            return button;
        };

        const fillMeasured = (tab, text, rows, minTokens = null) => {
            const element = find(`#${panelId(tab, "measured")}`);
            const target = element.querySelector(".prose") || element;
            const line = document.createElement("div");
            line.textContent = text;
            line.setAttribute("role", "status");
            const more = minTokens === null ? [] : [proposal(tab, minTokens)];
            target.replaceChildren(line, ...(rows.length ? [table(MEASURED_HEAD, rows)] : []), ...more);
        };

        const measure = async (tab) => {
            const values = readControls(tab, data, (last[tab] && last[tab].values) || data.defaults);
            const passes = passesOf(tab, layoutNow()).map(({width, height, start, hires}) => ({width, height, start, hires}));
            const {error} = await ask("measure", "POST", {values, passes});
            if (error) {
                fillMeasured(tab, error, []);
                return;
            }
            for (let state = {state: "running"}; state.state === "running" && !stopped.signal.aborted;) {
                await new Promise((done) => setTimeout(done, MEASURE_POLL_MS));
                state = await ask("measure");
                const text = state.state === "running" ? `Measuring: ${percent(state.progress)}` : state.text;
                fillMeasured(tab, text, state.outcomes.map(measuredRow), state.min_tokens);
                for (const outcome of state.outcomes) measured[timingKey(values, outcome)] = outcome;
            }
        };

        const press = ({target}) => {
            for (const tab of TABS) {
                if (target.closest(`#${panelId(tab, "measure")}`) && data) {
                    measure(tab).catch((error) => fillMeasured(tab, `Measuring failed: ${error.message}`, []));
                }
                if (target.closest(`#${panelId(tab, "measure_cancel")}`)) ask("measure", "DELETE").catch(() => {});
            }
        };

        const showSummary = (tab) => {
            const element = find(`#${panelId(tab, "summary")}`);
            if (!data || !isShown(element)) return;
            const values = readControls(tab, data, (last[tab] && last[tab].values) || data.defaults);
            showPreset(tab, values);
            const found = passesOf(tab, layoutNow());
            const passes = found.map((pass) => ({...pass, measured: measured[timingKey(values, pass)]}));
            const key = JSON.stringify([values, passes, data.model && data.model.notes]);
            if (!passes.length || (last[tab] && last[tab].key === key)) return;
            last[tab] = {key, values};
            const lines = summary(values, passes, data).map((words) => ({text: words.text, hint: hintSentence(words, data)}));
            if (!data.model) lines.push({text: "No model is loaded yet: figures are those of SD 1."});
            const notes = data.model ? data.model.notes.filter((note) => !values[note.unless]) : [];
            for (const note of notes) lines.push({text: "", hint: hintSentence(note, data)});
            fill(element, lines);
        };

        const showStatus = async () => {
            const status = await ask("status").catch(() => null);
            if (!status || stopped.signal.aborted) return;
            for (const tab of TABS) {
                const element = find(`#${panelId(tab, "status")}`);
                const wanted = status.text && options().agent_attention_status_line !== false;
                if (element) fill(element, wanted ? [{text: status.text}] : []);
            }
        };

        // Who has the map open and asked for a record wants to see the new image's.
        const showMaps = () => {
            for (const tab of TABS) {
                const button = find(`#${panelId(tab, "map_show")}`);
                if (isChecked(panelId(tab, "record")) && isShown(button)) button.click();
            }
        };

        // The host shows its Interrupt button while it generates.
        const watchGeneration = () => {
            const now = TABS.some((tab) => find(`#${tab}_interrupt`)?.style.display === "block");
            if (generating && !now) {
                showStatus();
                showMaps();
                learn();
            }
            generating = now;
        };

        const watchModel = () => {
            const chosen = options().sd_model_checkpoint;
            const due = Date.now() - asked > MODEL_RETRY_MS && !(data && data.model);
            if (chosen !== checkpoint || due) learn();
            checkpoint = chosen;
        };

        // gradio 3 draws the label of what is folded so that a mouse alone can open it.
        const reachFolds = (tab) => {
            for (const name of FOLDS) {
                const label = find(`#${panelId(tab, name)} > .label-wrap`);
                if (!label || label.tagName === "BUTTON") continue;
                label.tabIndex = 0;
                label.setAttribute("role", "button");
                label.setAttribute("aria-expanded", label.classList.contains("open"));
            }
        };

        const pressKey = (event) => {
            const label = event.target.closest(".label-wrap[role=button]");
            const ours = label && TABS.some((tab) => FOLDS.some((name) => label.parentElement.id === panelId(tab, name)));
            if (!ours || !["Enter", " "].includes(event.key)) return;
            event.preventDefault();
            label.click();
        };

        // The page is drawn, and the host's options are there, after the scripts have run.
        const greet = () => {
            if (greeted || !("agent_attention_status_line" in options()) || !find(`#${panelId(TABS[0], "status")}`)) return;
            greeted = true;
            showStatus();
        };

        const tick = () => {
            if (document.hidden) return;
            greet();
            watchModel();
            watchGeneration();
            TABS.forEach(showSummary);
            TABS.forEach(reachFolds);
        };

        const timer = setInterval(tick, POLL_MS);
        document.addEventListener("input", () => requestAnimationFrame(tick), {signal: stopped.signal});
        document.addEventListener("click", press, {signal: stopped.signal});
        document.addEventListener("keydown", pressKey, {signal: stopped.signal});
        return {
            choose,
            sync,
            stop: () => {
                clearInterval(timer);
                stopped.abort();
            },
        };
    };

    if (typeof module !== "undefined" && module.exports) {
        module.exports = pure;
    } else {
        // Loaded once more, by a reload of the UI or by hand: the newer one takes over.
        if (globalThis.agentAttentionReadout) globalThis.agentAttentionReadout.stop();
        globalThis.agentAttentionReadout = makeReadout();
    }
}
