"use strict";
// The panel's part of the page: it reads the controls, asks the server what they come to, and shows the answer. Nothing
// is worked out here: agentsd/panel/routes.py answers, agentsd/panel/controls.py makes the elements.
{
    const TABS = ["txt2img", "img2img"];
    const PASTING = "#paste, #txt2img_tab, #img2img_tab, #inpaint_tab"; // the host's buttons that bring an infotext
    const FOLDS = '[id*="_agent_attention"] > .label-wrap';
    const POLL_MS = 250; // sliders that the host moves by itself (paste, swap, presets) fire no event
    const DEBOUNCE_MS = 150; // a slider on its way is not worth a question
    const RETRY_MS = 5000;
    const TIMEOUT_MS = 10000; // a connection that has died silently would keep the panel waiting for minutes
    const SYNC_MS = 1000; // gradio takes a while to call us back
    const PATIENCE = 40; // ticks to wait for the panel where the host's own page is drawn
    const PRESET_OPTION = "agent_attention_preset", STATUS_OPTION = "agent_attention_status_line";
    // The host's options that the answer depends on
    const DECISIVE = /^(sd_model_checkpoint|upcast_attn|hypertile|token_merging|tome_ratio|todo_ratio|img2img_fix|agent_att)/;

    const find = (selector) => gradioApp().querySelector(selector);
    const panelId = (tab, name = "") => `${tab}_agent_attention${name && "_" + name}`;
    const findOurs = (tab, name, inner = "") => find(`#${panelId(tab, name)} ${inner}`.trim());
    const numberIn = (id) => {
        const value = parseFloat(find(`#${id} input[type=number]`)?.value);
        return Number.isNaN(value) ? undefined : value; // left out of a request: the server knows what is usual
    };
    const textIn = (id) => find(`#${id} input`)?.value ?? "";
    const isChecked = (id) => Boolean(find(`#${id} input[type=checkbox]`)?.checked);
    const isShown = (element) => Boolean(element && element.offsetParent);
    const options = () => (typeof opts === "undefined" ? {} : opts);
    // Storage may be forbidden
    const stored = (access) => {
        try {
            return access();
        } catch {
            return null;
        }
    };

    // ---- The server ----

    class Refused extends Error {} // the server understood, and what was asked for is wrong

    // One request. Every error has a message that ends a sentence in the panel.
    const ask = async (name, {method = "GET", body, signal} = {}) => {
        const more = body ? {headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)} : {};
        const answer = await fetch(`./agent-attention/${name}`, {method, signal, ...more}).catch(() => {
            throw new Error("the server does not answer");
        });
        const content = await answer.json().catch(() => undefined);
        if (answer.ok && content !== undefined) return content;
        if (answer.status === 422 && content) throw new Refused(content.detail);
        throw new Error({
            200: "the server's answer makes no sense",
            401: "log in again",
            // the extension was updated under a running server, which still has the older one's routes
            404: "restart the server, which runs another version",
        }[answer.status] ?? `the server failed (${answer.status})`);
    };

    // ---- The controls ----

    // What a control shows; null for an empty field, which stands for the default. Undefined where that cannot be told:
    // half a number or half a choice has been typed, or gradio 6 has not drawn what is folded.
    const readControl = (tab, {name, kind, choices}) => {
        const id = name === "enabled" ? `${panelId(tab)}-checkbox` : panelId(tab, name);
        if (kind === "flag") return find(`#${id} input[type=checkbox]`)?.checked;
        if (kind === "text") return find(`#${id} textarea, #${id} input`)?.value;
        const field = find(`#${id} input${kind === "choice" ? "" : "[type=number]"}`);
        if (kind === "choice") return choices.includes(field?.value) ? field.value : undefined;
        if (!field || field.validity.badInput) return undefined;
        return field.value === "" ? null : Number(field.value);
    };

    // Size of a pass: the sliders', or what img2img's "Resize by" makes of the image, which only the page knows.
    const sizeOf = (tab) => {
        const byScale = tab === "img2img" && isShown(find("#img2img_tab_resize_by"));
        const shown = byScale ? find("#img2img_scale_resolution_preview")?.textContent.match(/(\d+)x(\d+)\D*$/) : null;
        return shown ? [Number(shown[1]), Number(shown[2])] : [numberIn(`${tab}_width`), numberIn(`${tab}_height`)];
    };

    // The host's controls that decide on the passes; null while a size is being typed.
    const readPasses = (tab) => {
        const [width, height] = sizeOf(tab), number = (name) => numberIn(`${tab}_${name}`);
        const [scale, resize_x, resize_y, more] = ["hr_scale", "hr_resize_x", "hr_resize_y", "hires_steps"].map(number);
        const checkpoint = textIn("hr_checkpoint").replace(/^Use same checkpoint$/, "");
        const hires = isChecked(`${tab}_hr-checkbox`) ? {scale, resize_x, resize_y, steps: more, checkpoint} : null;
        if (!(width > 0 && height > 0 && (!hires || scale > 0))) return null;
        const [steps, batch_size, denoising] = ["steps", "batch_size", "denoising_strength"].map(number);
        const [sampler, scheduler] = ["sampling", "scheduler"].map((name) => textIn(`${tab}_${name}`));
        // as the host shows them: a token for each, such as "Token merging ratio: 0.5"
        const tokens = [...gradioApp().querySelectorAll(`#${tab}_override_settings .token`)];
        const overrides = tokens.map((token) => token.textContent.trim());
        return {width, height, steps, batch_size, denoising, sampler, scheduler, hires, overrides};
    };

    // ---- What is shown ----

    const made = (name, textContent, className) => Object.assign(document.createElement(name), {textContent, className});

    // The host's translation of a whole text, where it has one
    const translated = (text) => (typeof getTranslation === "function" && getTranslation(text)) || text;

    // A line, marked by its `state` for the style sheet. Hints name controls by their labels, which are shown translated.
    const lineOf = ({text, hint, state}) => {
        const line = made("div", text && hint ? `${text} ` : text, state ? `agent-attention-${state}` : "");
        const words = hint?.replace(/“([^”]+)”/g, (all, label) => `“${translated(label)}”`);
        if (hint) line.append(made("span", words, "agent-attention-hint"));
        return line;
    };

    // Fill one of the panel's gr.HTML elements with lines, which screen readers then read out.
    const fill = (element, lines) => {
        const inside = element.querySelector(".prose") || element;
        inside.replaceChildren(...lines.map(lineOf));
        inside.setAttribute("role", "status");
    };

    // Everything that runs in the page; `stop` takes all of it back.
    const makeReadout = () => {
        const stopped = new AbortController();
        // Of each tab: `values` are the settings as last known, `body` what is to be asked, `key` all that the answer
        // depends on, `request` the question under way, `again` when to repeat it, `lost` whether the server was out of
        // reach, `lines` what is shown, `found` the preset to choose after tuning, `preset` what the settings are,
        // undefined until the answer is there.
        const tabs = TABS.map((name) => ({name, values: {}, again: Infinity, lost: false, pressed: -Infinity}));
        const tabNamed = (name) => tabs.find((tab) => tab.name === name);
        let data = null, learnt = -Infinity; // the page's tables, and when they were asked for
        let version = 0; // goes up when the server may answer otherwise although nothing in the page has changed
        let greeted = false, missed = 0;

        const show = (tab, lines) => {
            const element = findOurs(tab.name, "summary");
            // nothing is read out twice; and gradio 6 draws the element anew, empty, when it is unfolded
            if (!element || (JSON.stringify(lines) === JSON.stringify(tab.lines) && element.textContent.trim())) return;
            tab.lines = lines;
            fill(element, lines);
        };

        const showTrouble = (tab, {message}) => show(tab, [{text: `The preview is not available: ${message}.`, state: "wrong"}]);

        // ---- The preview ----

        const learn = async () => {
            if (data || Date.now() - learnt < RETRY_MS || !findOurs(TABS[0], "summary")) return;
            learnt = Date.now();
            const given = await ask("page", {signal: stopped.signal}).catch((error) => error);
            if (!(given instanceof Error)) data = given;
            else if (!data && !stopped.signal.aborted) tabs.forEach((tab) => showTrouble(tab, given));
        };

        const settingNames = () => data.rows.map((row) => row.name).filter((name) => name !== "enabled");

        // Take note of the values that gradio hands over: it knows those of controls that are not drawn, too.
        const note = (tab, values) => settingNames().forEach((name, i) => { tab.values[name] = values[i]; });

        const bodyOf = (tab) => {
            for (const row of data.rows) {
                const value = readControl(tab.name, row);
                if (value !== undefined) tab.values[row.name] = value;
            }
            const passes = readPasses(tab.name);
            return passes && {tab: tab.name, values: {...tab.values}, ...passes};
        };

        // Ask for the newest body. A question that is overtaken is dropped, whenever its answer comes.
        const preview = async (tab) => {
            if (tab.lost && Date.now() < tab.again) return; // `look` comes back to it
            tab.request?.abort();
            const request = tab.request = new AbortController();
            const late = setTimeout(() => request.abort(), TIMEOUT_MS);
            const given = await ask("preview", {method: "POST", body: tab.body, signal: request.signal}).catch((error) => error);
            clearTimeout(late);
            if (tab.request !== request) return;
            tab.request = null;
            tab.lost = given instanceof Error && !(given instanceof Refused);
            // a model that is being loaded tells nobody when it is there
            tab.again = tab.lost || given.model === false ? Date.now() + RETRY_MS : Infinity;
            [tab.preset, tab.idle] = [given.preset, given.idle];
            if (tab.lost) showTrouble(tab, given);
            else show(tab, given instanceof Refused ? [{text: "", hint: given.message, state: "wrong"}] : given.lines);
        };

        // Of several tunings, the chart of the size that is set.
        const unfoldChart = (tab, {width, height}) => {
            const charts = [...(findOurs(tab.name, "tuned")?.querySelectorAll("details[data-size]") || [])];
            const passes = ["first", tab.name], size = `${width}×${height}`;
            const fitting = charts.filter(({dataset}) => dataset.size === size && passes.includes(dataset.pass));
            if (fitting.length) charts.forEach((chart) => { chart.open = fitting.includes(chart); });
        };

        const look = (tab) => {
            if (!isShown(findOurs(tab.name, "summary"))) return;
            learn();
            showHelp(tab);
            if (tab.lines) show(tab, tab.lines);
            const body = data && bodyOf(tab);
            if (!body) return;
            const decisive = Object.entries(options()).filter(([name]) => DECISIVE.test(name));
            // what is tuned counts as well: a tuning may have been made, imported or forgotten
            const key = JSON.stringify([body, decisive, version, findOurs(tab.name, "tuned")?.textContent]);
            if (key === tab.key) {
                if (!tab.request && Date.now() >= tab.again) preview(tab);
                else showPreset(tab);
                return;
            }
            unfoldChart(tab, body);
            Object.assign(tab, {key, body, preset: undefined});
            clearTimeout(tab.timer);
            tab.timer = setTimeout(preview, DEBOUNCE_MS, tab);
        };

        // ---- Help ----

        // Tooltips, which the host uses for help as well. They are asked for again where an element is drawn anew.
        const showHelp = (tab) => {
            for (const [name, text] of Object.entries(data ? data.help : {})) {
                const element = name === "enabled" ? findOurs(tab.name, "", "> .label-wrap") : findOurs(tab.name, name);
                if (!element) continue;
                const reason = tab.idle?.[name], title = [reason, translated(text)].filter(Boolean).join("\n");
                if (element.title !== title) element.title = title;
                element.classList.toggle("agent-attention-idle", Boolean(reason));
            }
        };

        // ---- Presets ----

        // A press of the hidden button makes gradio call `sync`.
        const pressSync = (tab) => {
            if (Date.now() - tab.pressed < SYNC_MS) return;
            tab.pressed = Date.now();
            findOurs(tab.name, "sync")?.click();
        };

        // Have the preset's control say what the others are, whoever has set them.
        const showPreset = (tab) => {
            const field = findOurs(tab.name, "preset", "input");
            const other = tab.preset !== undefined && field && field.value !== tab.preset ? field.value : undefined;
            // gradio writes every control anew, which would take back what is typed meanwhile
            const typed = ["preset", "rules"].map((name) => `#${panelId(tab.name, name)}`).join(", ");
            const typing = document.activeElement?.closest(typed);
            // seen twice: a preset that was chosen this moment is still filling the controls
            if (other !== undefined && other === tab.other && !typing) pressSync(tab);
            tab.other = other;
        };

        // Whether somebody has filled in the controls since gradio drew them. An infotext counts more than the page's preset.
        const isFilled = (name, values) => {
            const drawn = ((globalThis.gradio_config || {}).components || []).map(({props}) => props || {});
            return settingNames().some((setting, i) => {
                const before = drawn.find((props) => props.elem_id === panelId(name, setting) && "value" in props);
                return before && String(before.value) !== String(values[i]);
            });
        };

        // Handlers of gradio: [preset, every control but "enabled"] in, the same out.
        const choose = (name, [preset, ...values]) => {
            const chosen = data && data.presets[preset];
            if (!chosen) return [preset, ...values];
            const filled = settingNames().map((setting, i) => (setting in chosen ? chosen[setting] : values[i]));
            note(tabNamed(name), filled);
            return [preset, ...filled];
        };
        const sync = (name, [preset, ...values]) => {
            const tab = tabNamed(name), {wanted, found} = tab;
            tab.wanted = tab.found = undefined;
            if (data && found in data.presets) return choose(name, [found, ...values]);
            if (data && wanted in data.presets && !isFilled(name, values)) return choose(name, [wanted, ...values]);
            if (data) note(tab, values);
            return [tab.preset ?? preset, ...values];
        };

        const press = ({target}) => target.closest(PASTING) && tabs.forEach((tab) => { tab.wanted = undefined; });

        // ---- The last run ----

        // A run belongs to the page that asked for it: by the id that the host gives it, kept while the page's own
        // session lasts. Hosts without ids have one user.
        const taskKey = (tab) => `agent_attention_task_${tab.name}`;
        const taskOf = (tab) => tab.task ?? stored(() => sessionStorage.getItem(taskKey(tab))) ?? "";
        // Taken once, when this page begins to generate: afterwards another page may have put its own there.
        const noteTask = (tab) => {
            const task = stored(() => localStorage.getItem(`${tab.name}_task_id`));
            if (!task || task === tab.task) return;
            Object.assign(tab, {task, noted: true});
            stored(() => sessionStorage.setItem(taskKey(tab), task));
        };

        const showStatus = async (tab) => {
            const status = await ask(`status?task=${encodeURIComponent(taskOf(tab))}`).catch(() => null);
            const element = findOurs(tab.name, "status");
            if (!status || !element || stopped.signal.aborted) return null;
            const lines = options()[STATUS_OPTION] === false ? [] : status.lines;
            const when = new Date(1000 * status.at).toLocaleTimeString([], {hour: "2-digit", minute: "2-digit"});
            fill(element, lines.map((line, i) => (i ? line : {...line, text: `Last run, ${when}: ${line.text}`})));
            // the style sheet puts it above everything else
            element.classList.toggle("agent-attention-alert", lines.length > 0 && status.state === "wrong");
            return status;
        };

        // Handler of gradio: [task, call, layer] in and out.
        const ofTask = (name, [, call, layer]) => [taskOf(tabNamed(name)), call, layer];

        const showResult = async (tab) => {
            // who has the map open and asked for a record wants to see the new image's
            const map = findOurs(tab.name, "map_show");
            if (isChecked(panelId(tab.name, "record")) && isShown(map)) map.click();
            const status = await showStatus(tab);
            if (!(tab.values.tune > 0)) return;
            // an order to tune holds for one image; whoever gave it wants to see what was found, and to use it
            findOurs(tab.name, "tune_done")?.click();
            tab.found = status?.preset || undefined;
        };

        // The host shows one of these buttons while it generates. SD.Next shows them always, and keeps the request's id.
        const isGenerating = (tab) => Boolean(stored(() => localStorage.getItem("task")))
            || ["interrupt", "interrupting"].some((name) => find(`#${tab.name}_${name}`)?.style.display === "block");

        const watchGeneration = (tab) => {
            const now = isGenerating(tab);
            if (now && !tab.noted) noteTask(tab);
            tab.noted &&= now;
            if (tab.generating && !now) {
                version += 1; // another model may have been loaded for it
                showResult(tab);
            }
            tab.generating = now;
        };

        // The page is drawn, and the host's options are there, after the scripts have run.
        const greet = () => {
            if (!greeted && STATUS_OPTION in options() && findOurs(TABS[0], "status")) {
                greeted = true;
                for (const tab of tabs) {
                    tab.wanted = options()[PRESET_OPTION];
                    if (taskOf(tab)) showStatus(tab);
                }
            }
            if (tabs.some((tab) => tab.wanted !== undefined)) learn();
            for (const tab of tabs) if (data && (tab.found ?? tab.wanted) in data.presets) pressSync(tab);
        };

        // ---- The keyboard ----

        // gradio 3 draws the label of what is folded so that a mouse alone can open it.
        const reachFolds = () => {
            for (const label of gradioApp().querySelectorAll(FOLDS)) {
                if (label.tagName === "BUTTON") continue;
                label.tabIndex = 0;
                label.setAttribute("role", "button");
                label.setAttribute("aria-expanded", label.classList.contains("open"));
            }
        };

        const pressKey = (event) => {
            if (!["Enter", " "].includes(event.key) || !event.target.matches(`${FOLDS}[role=button]`)) return;
            event.preventDefault();
            event.target.click();
        };

        const tick = () => {
            if (document.hidden || stopped.signal.aborted) return;
            // without the extension's Python part (another one's package of the same name came first) there is no panel
            missed = find("#txt2img_prompt") && !findOurs(TABS[0]) ? missed + 1 : 0;
            if (missed > PATIENCE) return stop();
            greet();
            tabs.forEach(watchGeneration);
            tabs.forEach(look);
            reachFolds();
        };

        const stop = () => {
            clearInterval(timer);
            stopped.abort();
            for (const tab of tabs) {
                clearTimeout(tab.timer);
                tab.request?.abort();
                tab.request = null; // nobody waits for it any more
            }
        };

        const timer = setInterval(tick, POLL_MS);
        const listeners = {input: () => requestAnimationFrame(tick), click: press, keydown: pressKey};
        for (const [type, listener] of Object.entries(listeners)) {
            document.addEventListener(type, listener, {signal: stopped.signal});
        }
        return {choose, sync, ofTask, stop};
    };

    // Loaded once more, by a reload of the UI or by hand: the newer one takes over.
    globalThis.agentAttentionReadout?.stop();
    globalThis.agentAttentionReadout = makeReadout();
}
